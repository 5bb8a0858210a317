//! What the tests of all operations share: tables, values that are hard to code, dtypes.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::codebook::tests::{fp4, NF4};
use crate::oracle::{to_bf16, to_f16};
use crate::values::{Values, ValuesMut};

pub(crate) const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;
/// Places in a cache line, in bytes: where stores of each width are aligned, and where none is.
pub(crate) const PLACES: [usize; 6] = [0, 4, 16, 32, 48, 60];

/// NF4 (uniform bins), FP4 (permuted), and one whose values lie beyond [-1, 1] and repeat.
pub(crate) fn tables() -> [[f32; 16]; 3] {
    let odd =
        [0.5, -3.0, 0.5, 1.0, -1.0, 1.25, 0.75, -0.0, 0.0, 2.5, -1.0, 1e-3, -1e-3, -2.0, 0.9, -0.9];
    [NF4, fp4(), odd]
}

/// A sequence of numbers that a seed fixes (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// Weights in one dtype.
#[derive(Clone, Debug)]
pub(crate) enum Weights {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Weights {
    /// The values rounded to each dtype, those that round to infinity to the largest instead.
    pub(crate) fn all(values: &[f32]) -> [Self; 3] {
        let finite16 = |x: &f32| if x.is_finite() { x.clamp(-65504.0, 65504.0) } else { *x };
        let bf16 = values.iter().map(|&x| {
            let rounded = to_bf16(x);
            if x.is_finite() && !rounded.is_finite() {
                bf16::MAX.copysign(rounded)
            } else {
                rounded
            }
        });
        [
            Self::F32(values.to_vec()),
            Self::F16(values.iter().map(|x| to_f16(finite16(x))).collect()),
            Self::Bf16(bf16.collect()),
        ]
    }

    /// Room for `len` values of each dtype.
    pub(crate) fn room(len: usize) -> [Self; 3] {
        [
            Self::F32(vec![f32::NAN; len]),
            Self::F16(vec![f16::NAN; len]),
            Self::Bf16(vec![bf16::NAN; len]),
        ]
    }

    pub(crate) fn values(&self) -> Values<'_> {
        match self {
            Self::F32(v) => Values::F32(v),
            Self::F16(v) => Values::F16(v),
            Self::Bf16(v) => Values::Bf16(v),
        }
    }

    pub(crate) fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(v) => ValuesMut::F32(v),
            Self::F16(v) => ValuesMut::F16(v),
            Self::Bf16(v) => ValuesMut::Bf16(v),
        }
    }

    /// `len` values of this room that start `offset` bytes behind the start of a cache line, and
    /// how many there are before them.
    pub(crate) fn place(&mut self, offset: usize, len: usize) -> (usize, ValuesMut<'_>) {
        let (start, size) = match self {
            Self::F32(v) => (v.as_ptr().addr(), 4),
            Self::F16(v) => (v.as_ptr().addr(), 2),
            Self::Bf16(v) => (v.as_ptr().addr(), 2),
        };
        let before = (offset.wrapping_sub(start) % LINE) / size;
        (before, self.values_mut().split_at(before).1.split_at(len).0)
    }

    /// As fp32, exactly.
    pub(crate) fn widened(&self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.clone(),
            Self::F16(v) => v.iter().map(|x| x.to_f32_const()).collect(),
            Self::Bf16(v) => v.iter().map(|x| x.to_f32_const()).collect(),
        }
    }

    /// The bits, and one pattern for every NaN.
    pub(crate) fn bits(&self) -> Vec<u32> {
        let nan = |bits: u32, is_nan: bool| if is_nan { u32::MAX } else { bits };
        match self {
            Self::F32(v) => v.iter().map(|x| nan(x.to_bits(), x.is_nan())).collect(),
            Self::F16(v) => v.iter().map(|x| nan(x.to_bits().into(), x.is_nan())).collect(),
            Self::Bf16(v) => v.iter().map(|x| nan(x.to_bits().into(), x.is_nan())).collect(),
        }
    }
}

/// Values whose blocks are, by turns, ordinary, on decision bounds, zero, subnormal, huge, and
/// mixed.
pub(crate) fn hard_values(seed: u64, len: usize, blocksize: usize) -> Vec<f32> {
    let mut random = Random(seed);
    let mut values = Vec::with_capacity(len);
    while values.len() < len {
        let n = blocksize.min(len - values.len());
        let kind = random.below(8);
        let scale = 2.0_f32.powi(random.below(40) as i32 - 20);
        values.extend((0..n).map(|i| match kind {
            0 => random.unit() * 0.02,
            1 | 2 => near_bound(&mut random, i) * scale,
            3 => [0.0, -0.0][random.below(2)],
            4 => f32::from_bits(random.below(1 << 14) as u32) * [1.0, -1.0][random.below(2)],
            5 => random.unit() * 3.4e38,
            6 => random.unit() * 10.0_f32.powi(random.below(70) as i32 - 35),
            _ => (random.below(255) as f32 - 127.0) * scale, // ties of int8
        }));
    }
    values
}

/// A midpoint of neighbours in a table, or a float next to it; first of all the absmax, 1.
fn near_bound(random: &mut Random, i: usize) -> f32 {
    if i == 0 {
        return 1.0;
    }
    let mut table = tables()[random.below(3)];
    table.sort_by(f32::total_cmp);
    let k = random.below(15);
    let bound = ((table[k] + table[k + 1]) / 2.0).clamp(-1.0, 1.0);
    [bound, bound.next_up(), bound.next_down()][random.below(3)]
}

/// Lengths around blocks, groups of blocks and bytes.
pub(crate) fn lengths(blocksize: usize) -> [usize; 12] {
    let b = blocksize;
    let odd = 33 * b + b / 2 + 1;
    [0, 1, 2, b - 1, b, b + 1, 3 * b, 8 * b, 15 * b + 3, 16 * b, 17 * b, odd]
}

/// Lengths of rows: below a strip, around one, odd, several strips, more than a job.
pub(crate) const ROWS: [usize; 14] =
    [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 172, 1000, 4096, (1 << 16) + 33];

/// A seed, a length of rows and a number of values.
pub(crate) fn row_shapes() -> impl Strategy<Value = (u64, usize, usize)> {
    (any::<u64>(), 1..400_usize, 0..3000_usize)
}

/// A seed, a block size and a length of up to 40 blocks, if they are small.
pub(crate) fn shapes() -> impl Strategy<Value = (u64, usize, usize)> {
    (any::<u64>(), 0..BLOCKSIZES.len()).prop_flat_map(|(seed, i)| {
        let blocksize = BLOCKSIZES[i];
        (Just(seed), Just(blocksize), 0..(40 * blocksize).min(6000))
    })
}
