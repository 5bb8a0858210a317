//! AVX-512: 16 blocks at a time for the scales, 64 values at a time for the codes.
//!
//! 1. Each block is reduced to 16 lanes of maxima, 16 such vectors to one by a transposing tree, so
//!    that one division gives 16 scales.
//! 2. Codes by uniform binning where the table permits it (see `UniformBins`): one fused
//!    multiply-add gives the bin, two `vpermt2` look up its bound and its index, one comparison
//!    settles it. The index tables are shifted beforehand, so that OR merges four vectors.
//! 3. One `vpermb` gathers the 32 bytes of 64 codes.
//!
//! bfloat16 is split into even and odd values by a shift and a mask, which saves the widening
//! shuffles and leaves high and low nibbles apart.
//!
//! NF4 on one core of an Emerald Rapids Xeon that reads 15 GB/s: 14.9 GB/s of fp32 input, 12.0 of
//! bf16, 10.0 of fp16.

use std::arch::x86_64::*;

use crate::codebook::{Codebook, UniformBins};
use crate::quantize::{scalar, SMALLEST};
use crate::values::{Element, Values};
use crate::x86::avx512::{
    all_finite, bf16_lanes, clamp_to_one, f16_lanes, lanes, load, load_bf16, load_f16, load_f32,
    magnitudes_16_bit, magnitudes_f32, max_of_each, store_half,
};
use crate::x86::{avx2, prefetch_l2, Plain};

/// Blocks whose scales are computed together.
const GROUP: usize = 16;
/// Values that are packed together; the smallest block is half as long.
const STRIP: usize = 64;
const HALF: usize = STRIP / 2;
/// How far ahead values are fetched, in bytes: hardware prefetch stops at each page.
const AHEAD: usize = 16384;

/// The input and the outputs of one call.
struct Task<'a, T> {
    values: &'a [T],
    blocksize: usize,
    packed: &'a mut [u8],
    scales: Scales<'a>,
}

/// The scales of a call, one a block.
enum Scales<'a> {
    /// To be found and written: the absmax of each block.
    Absmax(&'a mut [f32]),
    /// To be coded against.
    Given(&'a [f32]),
}

/// Quantizes whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn quantize(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    dispatch(values, code, blocksize, packed, Scales::Absmax(absmax))
}

/// Codes whole blocks against the scales given.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn encode(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    scales: &[f32],
    packed: &mut [u8],
) {
    dispatch(values, code, blocksize, packed, Scales::Given(scales));
}

/// Picks the loads of a dtype.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn dispatch(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    scales: Scales<'_>,
) -> bool {
    match values {
        Values::F32(values) => search::<_, false>(
            Task { values, blocksize, packed, scales },
            code,
            |block| magnitudes_f32(block),
            |bits| _mm512_castsi512_ps(bits),
            |strip| core::array::from_fn(|i| load_f32(&strip.as_chunks().0[i])),
        ),
        Values::F16(values) => search::<_, false>(
            Task { values, blocksize, packed, scales },
            code,
            |block| magnitudes_16_bit(block),
            |bits| f16_lanes(bits),
            |strip| core::array::from_fn(|i| load_f16(&strip.as_chunks().0[i])),
        ),
        Values::Bf16(values) => search::<_, true>(
            Task { values, blocksize, packed, scales },
            code,
            |block| magnitudes_16_bit(block),
            |bits| bf16_lanes(bits),
            |strip| {
                let halves = strip.as_chunks::<HALF>().0;
                let ([a, b], [c, d]) = (load_bf16(&halves[0]), load_bf16(&halves[1]));
                [a, b, c, d]
            },
        ),
    }
}

/// Picks the search that the table permits.
///
/// What depends on the dtype: `magnitudes` reduces a block to 16 lanes of magnitudes that compare as
/// integers, `widen` makes them floats, `load` reads a strip, in order or (`EVEN_ODD`) each half
/// as even and odd values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn search<T: Element + Plain, const EVEN_ODD: bool>(
    task: Task<'_, T>,
    code: &Codebook,
    magnitudes: impl Fn(&[T]) -> __m512i,
    widen: impl Fn(__m512i) -> __m512,
    load: impl Fn(&[T; STRIP]) -> [__m512; 4],
) -> bool {
    let pack = Pack::<EVEN_ODD>::new(code);
    let given = matches!(task.scales, Scales::Given(_));
    if let Some(bins) = code.uniform() {
        let bins = Bins::new(bins, Pack::<EVEN_ODD>::SHIFTS);
        if given {
            let index = |i, s| bins.index(i, clamp_to_one(s));
            return blocks(task, code, &pack, magnitudes, widen, load, index);
        }
        blocks(task, code, &pack, magnitudes, widen, load, |i, s| bins.index(i, s))
    } else {
        let tree = Tree::new(code.bounds(), Pack::<EVEN_ODD>::SHIFTS);
        if given {
            let index = |i, s| tree.index(i, clamp_to_one(s));
            return blocks(task, code, &pack, magnitudes, widen, load, index);
        }
        blocks(task, code, &pack, magnitudes, widen, load, |i, s| tree.index(i, s))
    }
}

/// Quantizes groups of blocks. `index` gives the indices of vector `i` of a strip, in place for
/// [`Pack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn blocks<T: Element + Plain, const EVEN_ODD: bool>(
    task: Task<'_, T>,
    code: &Codebook,
    pack: &Pack<EVEN_ODD>,
    magnitudes: impl Fn(&[T]) -> __m512i,
    widen: impl Fn(__m512i) -> __m512,
    load: impl Fn(&[T; STRIP]) -> [__m512; 4],
    index: impl Fn(usize, __m512) -> __m512i,
) -> bool {
    let Task { values, blocksize, packed, mut scales } = task;
    let halves_per_block = (blocksize / HALF).trailing_zeros();
    let mut finite = true;
    let groups = values.chunks(GROUP * blocksize).zip(packed.chunks_mut(GROUP * blocksize / 2));
    for (group, (values, packed)) in groups.enumerate() {
        let found = scales.of_group(group, || {
            let mut maxima = [_mm512_setzero_si512(); GROUP];
            for (maximum, block) in maxima.iter_mut().zip(values.chunks_exact(blocksize)) {
                *maximum = magnitudes(block);
            }
            widen(max_of_each(&maxima))
        });
        let inverse = lanes(_mm512_div_ps(_mm512_set1_ps(1.0), at_least_smallest(found)));

        let (strips, rest) = values.as_chunks::<STRIP>();
        let (bytes, rest_bytes) = packed.as_chunks_mut::<HALF>();
        for (i, (strip, bytes)) in strips.iter().zip(bytes).enumerate() {
            for line in 0..size_of_val(strip) / 64 {
                prefetch_l2(strip, AHEAD + 64 * line);
            }
            let x = load(strip);
            let factor = |half| _mm512_set1_ps(inverse[(half >> halves_per_block) % GROUP]);
            let (low, high) = (factor(2 * i), factor(2 * i + 1));
            let codes = [
                index(0, _mm512_mul_ps(x[0], low)),
                index(1, _mm512_mul_ps(x[1], low)),
                index(2, _mm512_mul_ps(x[2], high)),
                index(3, _mm512_mul_ps(x[3], high)),
            ];
            store_half(bytes, pack.bytes(codes));
        }
        if let [_, ..] = rest {
            // an odd block of 32
            let last = lanes(found)[values.len() / blocksize - 1];
            scalar::encode_block(rest, code, last, rest_bytes);
        }
        if !all_finite(found) {
            finite = false;
            scales.repair(group, values, code, blocksize, packed);
        }
    }
    finite
}

impl Scales<'_> {
    /// The scales of a group of blocks; those to be found are written, too.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    fn of_group(&mut self, group: usize, absmax: impl FnOnce() -> __m512) -> __m512 {
        let mut found = [0.0; GROUP];
        match self {
            Self::Absmax(scales) => {
                found = lanes(absmax());
                let scales = scales[group * GROUP..].iter_mut();
                scales.zip(found).for_each(|(scale, absmax)| *scale = absmax);
            }
            Self::Given(scales) => {
                let scales = scales[group * GROUP..].iter();
                found.iter_mut().zip(scales).for_each(|(found, scale)| *found = *scale);
            }
        }
        load_f32(&found)
    }

    /// Puts the blocks of a group right whose scale is NaN or infinite.
    #[cold]
    fn repair<T: Element>(
        &mut self,
        group: usize,
        values: &[T],
        code: &Codebook,
        blocksize: usize,
        packed: &mut [u8],
    ) {
        let first = group * GROUP;
        match self {
            Self::Absmax(scales) => {
                scalar::repair(values, code, blocksize, packed, &mut scales[first..]);
            }
            Self::Given(scales) => {
                scalar::repair_codes(values, code, blocksize, &scales[first..], packed);
            }
        }
    }
}

/// Scales of magnitude 1e-38 or more, with their signs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn at_least_smallest(scales: __m512) -> __m512 {
    let sign = _mm512_set1_ps(-0.0);
    let magnitude = _mm512_max_ps(_mm512_andnot_ps(sign, scales), _mm512_set1_ps(SMALLEST));
    _mm512_or_ps(magnitude, _mm512_and_ps(sign, scales))
}

/// Index by uniform binning.
struct Bins {
    scale: __m512,
    threshold: [__m512; 2],
    base: [[__m512i; 2]; 4],
    one: [__m512i; 4],
}

impl Bins {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(bins: &UniformBins, shifts: [u32; 4]) -> Self {
        let threshold = bins.threshold.as_chunks::<16>().0;
        let base = bins.base.as_chunks::<16>().0;
        let shifted = |i: usize, v| _mm512_sll_epi32(v, _mm_cvtsi32_si128(shifts[i] as i32));
        Self {
            scale: _mm512_set1_ps(bins.scale),
            threshold: [load_f32(&threshold[0]), load_f32(&threshold[1])],
            base: core::array::from_fn(|i| {
                [shifted(i, load(&base[0])), shifted(i, load(&base[1]))]
            }),
            one: core::array::from_fn(|i| shifted(i, _mm512_set1_epi32(1))),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn index(&self, i: usize, s: __m512) -> __m512i {
        let magic = _mm512_set1_ps(UniformBins::MAGIC);
        let bin = _mm512_castps_si512(_mm512_fmadd_ps(s, self.scale, magic));
        let threshold = _mm512_permutex2var_ps(self.threshold[0], bin, self.threshold[1]);
        let base = _mm512_permutex2var_epi32(self.base[i][0], bin, self.base[i][1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, threshold);
        _mm512_mask_add_epi32(base, above, base, self.one[i])
    }
}

/// Index by a binary search over any 15 ascending bounds.
struct Tree {
    middle: __m512,
    /// `bounds[j + 3]`, `bounds[j + 1]` and `bounds[j]` in lane `j`: what each step looks at.
    steps: [__m512; 3],
    shifts: [u32; 4],
}

impl Tree {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(bounds: &[f32; 15], shifts: [u32; 4]) -> Self {
        let from = |first: usize| {
            load_f32(&core::array::from_fn(|j| bounds.get(first + j).copied().unwrap_or(0.0)))
        };
        Self { middle: _mm512_set1_ps(bounds[7]), steps: [from(3), from(1), from(0)], shifts }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn index(&self, i: usize, s: __m512) -> __m512i {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, self.middle);
        let mut index = _mm512_maskz_set1_epi32(above, 8);
        for (step, bounds) in [4, 2, 1].into_iter().zip(self.steps) {
            let bound = _mm512_permutexvar_ps(index, bounds);
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(s, bound);
            index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
        }
        _mm512_sll_epi32(index, _mm_cvtsi32_si128(self.shifts[i] as i32))
    }
}

/// Merges the indices of 64 values, in four vectors shifted by `SHIFTS`, to 32 bytes.
struct Pack<const EVEN_ODD: bool> {
    gather: __m512i,
    /// The code of each index in both nibbles, unless it is the index itself.
    order: Option<[__m256i; 2]>,
}

impl<const EVEN_ODD: bool> Pack<EVEN_ODD> {
    /// In order, vector `i` goes to byte `i`. Even and odd: high and low nibbles of bytes 0 and 1.
    const SHIFTS: [u32; 4] = if EVEN_ODD { [4, 0, 12, 8] } else { [0, 8, 16, 24] };

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new(code: &Codebook) -> Self {
        let mut gather = [0_u8; 64];
        for (to, from) in gather.iter_mut().take(HALF).enumerate() {
            // Even and odd: byte `to / 16` of lane `to % 16`. In order: byte `to / 8` of the
            // 64-bit lane `to % 8`.
            *from = if EVEN_ODD { 4 * (to % 16) + to / 16 } else { 8 * (to % 8) + to / 8 } as u8;
        }
        let order = *code.order();
        let both = |shift: u32| {
            let table: [u8; 32] = core::array::from_fn(|i| order[i % 16] << shift);
            avx2::load(&table)
        };
        Self { gather: load(&gather), order: (!order.is_sorted()).then(|| [both(4), both(0)]) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
    fn bytes(&self, [a, b, c, d]: [__m512i; 4]) -> __m256i {
        let mut merged = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
        if !EVEN_ODD {
            // A 64-bit lane holds an even value's four indices, then an odd one's: pair them.
            let (even, odd) = (_mm512_slli_epi64::<4>(merged), _mm512_srli_epi64::<32>(merged));
            merged = _mm512_or_si512(even, odd);
        }
        let bytes = _mm512_castsi512_si256(_mm512_permutexvar_epi8(self.gather, merged));
        let Some([high, low]) = self.order else { return bytes };
        let nibble = _mm256_set1_epi8(15);
        let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
        let lower = _mm256_and_si256(bytes, nibble);
        _mm256_or_si256(_mm256_shuffle_epi8(high, upper), _mm256_shuffle_epi8(low, lower))
    }
}
