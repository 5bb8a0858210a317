//! Every body through the public functions: it stays within its slices wherever these start, and a
//! NaN is found in any place. Whether the bytes are right is what the tests beside the bodies say;
//! here they are those of the scalar body on aligned memory.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use core::fmt::Debug;

use half::{bf16, f16};
use proptest::prelude::*;
use qkern_codec::*;

/// Elements around a slice of outputs that must stay as they are.
const GUARD: usize = 64;

/// A dtype that has a codec.
trait Dtype: Copy + Debug + PartialEq {
    const NAN: Self;
    /// No value that a test decodes.
    const CANARY: Self;
    fn round(value: f32) -> Self;
    fn values(slice: &[Self]) -> Values<'_>;
    fn values_mut(slice: &mut [Self]) -> ValuesMut<'_>;
}

macro_rules! impl_dtype {
    ($type:ty, $kind:ident, $round:expr) => {
        impl Dtype for $type {
            const NAN: Self = <$type>::NAN;
            const CANARY: Self = <$type>::MAX;
            fn round(value: f32) -> Self {
                $round(value)
            }
            fn values(slice: &[Self]) -> Values<'_> {
                Values::$kind(slice)
            }
            fn values_mut(slice: &mut [Self]) -> ValuesMut<'_> {
                ValuesMut::$kind(slice)
            }
        }
    };
}
impl_dtype!(f32, F32, |value| value);
impl_dtype!(f16, F16, f16::from_f32_const);
impl_dtype!(bf16, Bf16, bf16::from_f32_const);

/// A slice at some distance from both ends of its allocation. Without room behind it, an address
/// sanitizer sees what is read or written past its end.
struct Guarded<T> {
    memory: Box<[T]>,
    start: usize,
    end: usize,
    around: T,
}

impl<T: Copy + Debug + PartialEq> Guarded<T> {
    fn new(values: &[T], around: T, (before, behind): (usize, usize)) -> Self {
        let mut memory = vec![around; before + values.len() + behind];
        memory[before..before + values.len()].copy_from_slice(values);
        let end = before + values.len();
        Self { memory: memory.into_boxed_slice(), start: before, end, around }
    }

    fn room(len: usize, canary: T, place: (usize, usize)) -> Self {
        Self::new(&vec![canary; len], canary, place)
    }

    fn get(&self) -> &[T] {
        &self.memory[self.start..self.end]
    }

    fn get_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..self.end]
    }

    /// What was written, if that is all that was written.
    fn written(&self) -> &[T] {
        let outside = [&self.memory[..self.start], &self.memory[self.end..]].concat();
        assert!(outside.iter().all(|x| *x == self.around), "written outside of the slice");
        self.get()
    }
}

/// Everything that one call each of the operations writes, but for searched scales, which may differ.
#[derive(PartialEq)]
struct Written<T> {
    bytes: [Vec<u8>; 2],
    codes: Vec<i8>,
    absmax: [Vec<f32>; 3],
    values: [Vec<Vec<T>>; 3],
    encoded: Vec<u8>,
    rows: (Vec<i8>, Vec<f32>, Vec<T>),
}

/// Runs all operations with slices in such a place of their memory.
fn run<T: Dtype>(
    bodies: &'static Bodies,
    values: &[T],
    blocksize: usize,
    place: (usize, usize),
) -> Written<T> {
    let engine = Engine { bodies, ..Engine::detect().unwrap() };
    let next = |shift: usize| (place.0 + shift, place.1); // no two slices in the same place
    let input = Guarded::new(values, T::NAN, place);
    let blocks = num_blocks(values.len(), blocksize);
    let mut written = Written {
        bytes: [vec![], vec![]],
        codes: vec![],
        absmax: [vec![], vec![], vec![]],
        values: [vec![], vec![], vec![]],
        encoded: encode(engine, &input, blocksize, place),
        rows: rows(engine, &input, place),
    };
    for (i, table) in [NF4, permuted()].iter().enumerate() {
        let code = Codebook::new(table).unwrap();
        let mut packed = Guarded::room(packed_len(values.len()), 0xab, next(1));
        let mut absmax = Guarded::room(blocks, f32::MAX, next(2));
        let (to, scales) = (packed.get_mut(), absmax.get_mut());
        let values = T::values(input.get());
        quantize_4bit(engine, values, &code, blocksize, NonFinite::Error, to, scales).unwrap();
        written.bytes[i] = packed.written().to_vec();
        written.absmax[i] = absmax.written().to_vec();

        let packed = Guarded::new(packed.get(), 0xab, next(3));
        let absmax = Guarded::new(absmax.get(), f32::NAN, place);
        for stores in [Stores::Cached, Stores::Streaming] {
            let mut out = Guarded::room(input.get().len(), T::CANARY, next(2));
            let (from, scales, to) = (packed.get(), absmax.get(), T::values_mut(out.get_mut()));
            dequantize_4bit(engine, from, scales, table, blocksize, to, stores).unwrap();
            written.values[i].push(out.written().to_vec());
        }
    }
    let mut codes = Guarded::room(values.len(), -77, next(1));
    let mut absmax = Guarded::room(blocks, f32::MAX, next(2));
    let (from, to, scales) = (T::values(input.get()), codes.get_mut(), absmax.get_mut());
    quantize_int8(engine, from, blocksize, NonFinite::Error, to, scales).unwrap();
    written.codes = codes.written().to_vec();
    written.absmax[2] = absmax.written().to_vec();

    let codes = Guarded::new(codes.get(), -77, next(3));
    let absmax = Guarded::new(absmax.get(), f32::NAN, place);
    for stores in [Stores::Cached, Stores::Streaming] {
        let mut out = Guarded::room(values.len(), T::CANARY, next(2));
        let to = T::values_mut(out.get_mut());
        dequantize_int8(engine, codes.get(), absmax.get(), blocksize, to, stores).unwrap();
        written.values[2].push(out.written().to_vec());
    }
    written
}

/// Searches scales with and without importance; returns the codes against other ones.
fn encode<T: Dtype>(
    engine: Engine,
    input: &Guarded<T>,
    blocksize: usize,
    (before, behind): (usize, usize),
) -> Vec<u8> {
    // Miri takes minutes for more; the end, so that reading past it is seen.
    let all = input.get();
    let input = if cfg!(miri) { &all[all.len().saturating_sub(75)..] } else { all };
    let (values, len) = (T::values(input), input.len());
    let (blocks, code) = (num_blocks(len, blocksize), Codebook::new(&NF4).unwrap());
    let columns = (1..=40).rev().find(|n| len.is_multiple_of(*n)).unwrap();
    let weights: Vec<f32> = (1..=columns).map(|i| i as f32).collect();
    let weights = Guarded::new(&weights, f32::NAN, (before + 3, behind));
    for importance in [None, Some(weights.get())] {
        let mut scales = Guarded::room(blocks, f32::MAX, (before + 2, behind));
        let (to, refuse) = (scales.get_mut(), NonFinite::Error);
        search_scales(engine, values, &code, blocksize, importance, refuse, to).unwrap();
        // Values lie in [-2, 2), what is around them is NaN or huge. The largest code may stay
        // unused, where values are many at the ends.
        assert!(scales.written().iter().all(|scale| scale.abs() <= 4.0));
    }
    let scales: Vec<f32> = (0..blocks).map(|i| [-1.5, 0.7, 0.0][i % 3]).collect();
    let scales = Guarded::new(&scales, f32::NAN, (before + 2, behind));
    let mut packed = Guarded::room(packed_len(len), 0xab, (before + 1, behind));
    encode_4bit(engine, values, &code, blocksize, scales.get(), packed.get_mut()).unwrap();
    packed.written().to_vec()
}

/// int8 by rows of 37 values.
fn rows<T: Dtype>(
    engine: Engine,
    input: &Guarded<T>,
    (before, behind): (usize, usize),
) -> (Vec<i8>, Vec<f32>, Vec<T>) {
    let (row, len) = (37, input.get().len());
    let mut codes = Guarded::room(len, -77, (before + 1, behind));
    let mut absmax = Guarded::room(num_blocks(len, row), f32::MAX, (before + 2, behind));
    let (from, to, scales) = (T::values(input.get()), codes.get_mut(), absmax.get_mut());
    quantize_int8_rows(engine, from, row, NonFinite::Error, to, scales).unwrap();
    let (codes, absmax) = (codes.written().to_vec(), absmax.written().to_vec());

    let from = Guarded::new(&codes, -77, (before + 3, behind));
    let scales = Guarded::new(&absmax, f32::NAN, (before, behind));
    let mut out = Guarded::room(len, T::CANARY, (before + 2, behind));
    let to = T::values_mut(out.get_mut());
    dequantize_int8(engine, from.get(), scales.get(), row, to, Stores::Streaming).unwrap();
    (codes, absmax, out.written().to_vec())
}

/// All bodies, with slices in several places, write what the scalar body writes.
fn check<T: Dtype>(seed: u64, len: usize, blocksize: usize, places: &[(usize, usize)]) {
    let values: Vec<T> = numbers(seed, len).into_iter().map(T::round).collect();
    let scalar = available()[available().len() - 1];
    let expected = run(scalar, &values, blocksize, (0, 0));
    for &bodies in available() {
        for &place in places {
            let found = run(bodies, &values, blocksize, place);
            assert!(found == expected, "{}, {len} values by {blocksize}", bodies.name());
        }
    }
}

fn check_dtypes(seed: u64, len: usize, blocksize: usize, places: &[(usize, usize)]) {
    check::<f32>(seed, len, blocksize, places);
    check::<bf16>(seed, len, blocksize, places);
    // Miri has no instructions that convert half precision.
    if !cfg!(all(miri, target_feature = "f16c")) {
        check::<f16>(seed, len, blocksize, places);
    }
}

proptest! {
    #[test]
    fn any_place(
        seed in any::<u64>(),
        blocksize in (5..13_u32).prop_map(|power| 1 << power),
        len in 0..5000_usize,
        before in 0..70_usize,
        behind in prop::sample::select(vec![0, GUARD]),
    ) {
        let len = if cfg!(miri) { len % 70 } else { len };
        check_dtypes(seed, len, blocksize, &[(before, behind)]);
    }
}

#[test]
fn every_block_size_and_length_at_odd_places() {
    if cfg!(miri) {
        return check_dtypes(1, 9 * 32 + 11, 32, &[(1, 0)]); // a group of AVX2's, a block, the rest
    }
    for b in (5..13).map(|power| 1 << power) {
        let whole = [0, b, 3 * b, 8 * b, 16 * b, 17 * b];
        let ragged = [1, 2, b - 1, b + 1, 15 * b + 3, 33 * b + b / 2 + 1];
        for len in whole.into_iter().chain(ragged) {
            check_dtypes(len as u64, len, b, &[(1, 0), (1, GUARD), (3, GUARD), (30, 0)]);
        }
    }
}

/// One NaN or infinity in each place of a few groups of blocks, whole and ragged.
fn check_each_place<T: Dtype>(blocksize: usize, len: usize, step: usize) {
    let clean: Vec<T> = numbers(1, len).into_iter().map(T::round).collect();
    let scalar = available()[available().len() - 1];
    let unhurt = keep(scalar, &clean, blocksize);
    for place in (0..len).step_by(step) {
        let mut values = clean.clone();
        let bad = [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY][place % 4];
        values[place] = T::round(bad);
        let expected = keep(scalar, &values, blocksize);
        let hurt = place / blocksize * blocksize..(place / blocksize + 1) * blocksize;
        for &bodies in available() {
            let engine = Engine { bodies, ..Engine::detect().unwrap() };
            let name = bodies.name();
            for error in refusals(engine, &values, blocksize) {
                assert_eq!(error, CodecError::NonFinite { index: place, count: 1 }, "{name}");
            }
            let found = keep(bodies, &values, blocksize);
            assert!(found == expected, "{name}, {bad} at {place} of {len} by {blocksize}");
            let absmax = f32::from_bits(found.1[place / blocksize]);
            assert_eq!((absmax.is_nan(), absmax.is_finite()), (bad.is_nan(), false), "{name}");
            for i in (0..len).filter(|i| !hurt.contains(i)) {
                assert_eq!(found.0[i / 2], unhurt.0[i / 2], "{name}, value {i}");
                assert_eq!(found.2[i], unhurt.2[i], "{name}, value {i}");
            }
        }
    }
}

/// Codes and scales, 4-bit and int8, with nothing refused.
fn keep<T: Dtype>(
    bodies: &'static Bodies,
    values: &[T],
    blocksize: usize,
) -> (Vec<u8>, Vec<u32>, Vec<i8>, Vec<u32>) {
    let engine = Engine { bodies, ..Engine::detect().unwrap() };
    let blocks = num_blocks(values.len(), blocksize);
    let (mut packed, mut codes) = (vec![0xab; packed_len(values.len())], vec![-77; values.len()]);
    let (mut absmax, mut absmax8) = (vec![-1.0; blocks], vec![-1.0; blocks]);
    let (from, code) = (T::values(values), Codebook::new(&NF4).unwrap());
    quantize_4bit(engine, from, &code, blocksize, NonFinite::Keep, &mut packed, &mut absmax)
        .unwrap();
    quantize_int8(engine, from, blocksize, NonFinite::Keep, &mut codes, &mut absmax8).unwrap();
    let bits = |scales: Vec<f32>| scales.into_iter().map(f32::to_bits).collect();
    (packed, bits(absmax), codes, bits(absmax8))
}

/// The errors of both encoders.
fn refusals<T: Dtype>(engine: Engine, values: &[T], blocksize: usize) -> [CodecError; 2] {
    let blocks = num_blocks(values.len(), blocksize);
    let (mut packed, mut codes) = (vec![0; packed_len(values.len())], vec![0; values.len()]);
    let (mut absmax, no) = (vec![0.0; blocks], NonFinite::Error);
    let (from, code) = (T::values(values), Codebook::new(&NF4).unwrap());
    [
        quantize_4bit(engine, from, &code, blocksize, no, &mut packed, &mut absmax).unwrap_err(),
        quantize_int8(engine, from, blocksize, no, &mut codes, &mut absmax).unwrap_err(),
    ]
}

#[test]
fn nan_and_infinity_are_found_in_every_place() {
    // A whole group of blocks for every body, the start of another, and a ragged block.
    let mut cases = vec![(32, 19 * 32 + 9, 1), (64, 19 * 64 + 9, 1), (512, 19 * 512 + 9, 61)];
    if cfg!(miri) {
        cases = vec![(32, 3 * 32 + 9, 31)];
    }
    for (blocksize, len, step) in cases {
        check_each_place::<f32>(blocksize, len, step);
        check_each_place::<bf16>(blocksize, len, step);
        if !cfg!(all(miri, target_feature = "f16c")) {
            check_each_place::<f16>(blocksize, len, step);
        }
    }
}

/// Numbers between -2 and 2 that a seed fixes, some of them 0 (splitmix64).
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let number =
        |bits: u64| if bits.is_multiple_of(16) { 0.0 } else { (bits >> 40) as f32 / 4_194_304.0 };
    (0..len).map(|_| number(next()) - 2.0).collect()
}

const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// The same values in another order, for which the bodies search in another way.
fn permuted() -> [f32; 16] {
    core::array::from_fn(|i| NF4[(7 * i + 3) % 16])
}
