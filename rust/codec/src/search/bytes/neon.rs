//! NEON: 4 blocks at a time for the trials, one number of 32 bits a block.
//!
//! 1. Values become bytes, of which `tbl` looks up 16 in 64.
//! 2. Products of bytes are summed by fours in 16 bits, then in 32: a vector a block, since there is
//!    no room for more. The vectors of four blocks are added up by a tree of pairs.
//! 3. The exact comparison runs on one block at a time, its sums are added up by such a tree too.

use std::arch::aarch64::*;

use crate::codebook::Codebook;
use crate::neon::{
    absmax_bf16, absmax_f16, absmax_f32, load, prefetch, store, strip_bf16, strip_f16, strip_f32,
    Plain, STRIP,
};
use crate::search::bytes::{search_groups, Best, Errors, Plan, Trial, GROUP, SLOTS, TRIALS};
use crate::search::neon::Nearest;
use crate::values::{Element, Values};

const LANES: usize = 4;
/// How far ahead values are fetched, in bytes.
const AHEAD: usize = 4096;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "neon")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    plan: &Plan,
    blocksize: usize,
    scales: &mut [f32],
) -> bool {
    let task = Task { plan, blocksize, nearest: Nearest::new(code) };
    match values {
        Values::F32(values) => {
            task.search(values, scales, |block| absmax_f32(block), |strip| strip_f32(strip))
        }
        Values::F16(values) => {
            task.search(values, scales, |block| absmax_f16(block), |strip| strip_f16(strip))
        }
        Values::Bf16(values) => {
            task.search(values, scales, |block| absmax_bf16(block), |strip| strip_bf16(strip))
        }
    }
}

/// What stays the same for all groups.
struct Task<'a> {
    plan: &'a Plan,
    blocksize: usize,
    nearest: Nearest,
}

impl Task<'_> {
    /// What depends on the dtype: the `absmax` of a block, `load` of a strip.
    #[inline]
    #[target_feature(enable = "neon")]
    fn search<T: Element + Plain>(
        &self,
        values: &[T],
        scales: &mut [f32],
        absmax: impl Fn(&[T]) -> f32,
        load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8] + Copy,
    ) -> bool {
        let absmax = |group: &[T]| {
            let mut maxima = [0.0; GROUP];
            for (maximum, block) in maxima.iter_mut().zip(group.chunks_exact(self.blocksize)) {
                for line in 0..size_of_val(block) / 64 {
                    prefetch(block, AHEAD + 64 * line);
                }
                *maximum = absmax(block);
            }
            maxima
        };
        let best = |group: &[T], factors| self.best(group, &factors, load);
        let errors = |group: &[T], inverse, factors| self.errors(group, &inverse, &factors, load);
        let task = (values, T::MAX);
        search_groups(task, self.plan, self.blocksize, scales, absmax, best, errors)
    }

    /// The best trial of each block of a group.
    #[inline]
    #[target_feature(enable = "neon")]
    fn best<T>(
        &self,
        group: &[T],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8] + Copy,
    ) -> Best {
        let mut best = Best { qc: [1.0; GROUP], cc: [1.0; GROUP] };
        let (qc, cc) = (best.qc.as_chunks_mut().0.iter_mut(), best.cc.as_chunks_mut().0.iter_mut());
        let groups = group.chunks(LANES * self.blocksize).zip(factors.as_chunks().0);
        for ((blocks, factors), (qc, cc)) in groups.zip(qc.zip(cc)) {
            let found = self.best_of_4(blocks, factors, load);
            store::<f32, LANES>(qc, vreinterpretq_u8_f32(found[0]));
            store::<f32, LANES>(cc, vreinterpretq_u8_f32(found[1]));
        }
        best
    }

    /// `sum(q c)` and `sum(c c)` of the best trial of each of 4 blocks.
    #[inline]
    #[target_feature(enable = "neon")]
    fn best_of_4<T>(
        &self,
        blocks: &[T],
        factors: &[f32; LANES],
        load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8] + Copy,
    ) -> [float32x4_t; 2] {
        let Self { plan, blocksize, .. } = *self;
        let mut sums = [[[vdupq_n_u32(0); 4]; LANES]; TRIALS];
        for (b, (block, factor)) in blocks.chunks_exact(blocksize).zip(factors).enumerate() {
            // Two strips at a time: fewer loads of tables.
            for strips in block.as_chunks().0.chunks(2) {
                let mut pairs = [[Column::new(vdupq_n_s8(0), plan.symmetric); 2]; 2];
                for (pair, strip) in pairs.iter_mut().zip(strips) {
                    *pair = bytes(load(strip), *factor).map(|q| Column::new(q, plan.symmetric));
                }
                for (sums, trial) in sums.iter_mut().zip(&plan.trials) {
                    add_trial(&mut sums[b], &pairs[..strips.len()], trial);
                }
            }
        }
        let mut best = [vdupq_n_f32(1.0), vdupq_n_f32(1.0), vdupq_n_f32(-1.0)];
        for blocks in &sums {
            let [qc, cc, second_qc, second_cc] = core::array::from_fn(|i| {
                let [a, b, c, d] = blocks.each_ref().map(|sums| sums[i]);
                vcvtq_f32_u32(vpaddq_u32(vpaddq_u32(a, b), vpaddq_u32(c, d)))
            });
            best = better(best, qc, cc);
            best = better(best, vmulq_n_f32(second_qc, plan.sign_of_second()), second_cc);
        }
        [best[0], best[1]]
    }

    /// The sums of the exact comparison, for two factors a block.
    #[inline]
    #[target_feature(enable = "neon")]
    fn errors<T>(
        &self,
        group: &[T],
        inverse: &[f32; GROUP],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8] + Copy,
    ) -> Errors {
        let mut errors = Errors::default();
        for (b, block) in group.chunks_exact(self.blocksize).enumerate() {
            // Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15 of 16.
            let mut sums = [[vdupq_n_f32(0.0); 4]; 4];
            for strip in block.as_chunks().0 {
                for (i, x) in load(strip).into_iter().enumerate() {
                    let u = vmulq_n_f32(x, inverse[b]);
                    let v = vmulq_n_f32(u, factors[b]);
                    let from_absmax = vsubq_f32(u, self.nearest.of(u));
                    let c = self.nearest.of(v);
                    let d = vsubq_f32(v, c);
                    let pairs = [(from_absmax, from_absmax), (d, d), (d, c), (c, c)];
                    for (sums, (a, b)) in sums.iter_mut().zip(pairs) {
                        sums[i % 4] = vaddq_f32(sums[i % 4], vmulq_f32(a, b));
                    }
                }
            }
            let mut found = [0.0; 4];
            store(&mut found, vreinterpretq_u8_f32(sum_of_each(sums)));
            [errors.by_absmax[b], errors.dd[b], errors.dc[b], errors.cc[b]] = found;
        }
        errors
    }
}

/// 32 values times a factor, rounded to signed bytes.
#[inline]
#[target_feature(enable = "neon")]
fn bytes(values: [float32x4_t; 8], factor: f32) -> [int8x16_t; 2] {
    // Nearest, ties to even; 0 for NaN, as infinity times 0 is.
    let [a, b, c, d, e, f, g, h] =
        values.map(|x| vreinterpretq_s16_s32(vcvtnq_s32_f32(vmulq_n_f32(x, factor))));
    // The low halves: all of a number from -127 to 127.
    let halves = |a, b| vreinterpretq_s8_s16(vuzp1q_s16(a, b));
    [vuzp1q_s8(halves(a, b), halves(c, d)), vuzp1q_s8(halves(e, f), halves(g, h))]
}

/// 16 values of a block.
#[derive(Clone, Copy)]
struct Column {
    magnitude: uint8x16_t,
    slot: uint8x16_t,
    /// All bits of a byte where the second table comes first, or none.
    turned: uint8x16_t,
}

impl Column {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new(q: int8x16_t, symmetric: bool) -> Self {
        let magnitude = vreinterpretq_u8_s8(vabsq_s8(q));
        let turned = if symmetric { vdupq_n_u8(0) } else { vcltzq_s8(q) };
        Self { magnitude, slot: vshrq_n_u8::<1>(magnitude), turned }
    }
}

/// Adds `sum(q c)` and `sum(c c)` of a block by the first scale of a trial, then by the second.
#[inline]
#[target_feature(enable = "neon")]
fn add_trial(sums: &mut [uint32x4_t; 4], pairs: &[[Column; 2]], trial: &Trial) {
    let tables = [table(&trial.first.values), table(&trial.second.values)];
    let mut found = *sums;
    for pair in pairs {
        let magnitudes = pair.map(|column| column.magnitude);
        let values = pair.map(|Column { slot, turned, .. }| {
            let [first, second] = tables.map(|table| vqtbl4q_u8(table, slot));
            [vbslq_u8(turned, second, first), vbslq_u8(turned, first, second)]
        });
        let [c, other] = core::array::from_fn(|i| values.map(|values| values[i]));
        found = [
            add_products(found[0], magnitudes, c),
            add_products(found[1], c, c),
            add_products(found[2], magnitudes, other),
            add_products(found[3], other, other),
        ];
    }
    *sums = found;
}

#[inline]
#[target_feature(enable = "neon")]
fn table(values: &[u8; SLOTS]) -> uint8x16x4_t {
    let [a, b, c, d] = core::array::from_fn(|i| load(&values.as_chunks::<16>().0[i]));
    uint8x16x4_t(a, b, c, d)
}

/// Adds the products of 32 bytes of 127 at most: four of them fit 16 bits.
#[inline]
#[target_feature(enable = "neon")]
fn add_products(sum: uint32x4_t, a: [uint8x16_t; 2], b: [uint8x16_t; 2]) -> uint32x4_t {
    let low = vmull_u8(vget_low_u8(a[0]), vget_low_u8(b[0]));
    let first = vmlal_high_u8(low, a[0], b[0]);
    let low = vmlal_u8(first, vget_low_u8(a[1]), vget_low_u8(b[1]));
    vpadalq_u16(sum, vmlal_high_u8(low, a[1], b[1]))
}

/// The better of two trials of each block, `sum(q c)`, `sum(c c)` and the first squared, of equal
/// ones the first.
#[inline]
#[target_feature(enable = "neon")]
fn better(
    [best_qc, best_cc, squared]: [float32x4_t; 3],
    qc: float32x4_t,
    cc: float32x4_t,
) -> [float32x4_t; 3] {
    let square = vmulq_f32(qc, qc);
    let better = vcgtq_f32(vmulq_f32(square, best_cc), vmulq_f32(squared, cc));
    [
        vbslq_f32(better, qc, best_qc),
        vbslq_f32(better, cc, best_cc),
        vbslq_f32(better, square, squared),
    ]
}

/// The sums of 16 lanes each, in the order of [`sum`](crate::search::bytes::sum).
#[inline]
#[target_feature(enable = "neon")]
fn sum_of_each(sums: [[float32x4_t; 4]; 4]) -> float32x4_t {
    // Lanes 0 and 2 of each of two vectors, then 1 and 3.
    let halves = |a, b| {
        let [a, b] = [vreinterpretq_u64_f32(a), vreinterpretq_u64_f32(b)];
        let low = vreinterpretq_f32_u64(vzip1q_u64(a, b));
        vaddq_f32(low, vreinterpretq_f32_u64(vzip2q_u64(a, b)))
    };
    let [a, b, c, d] = sums.map(|[a, b, c, d]| vpaddq_f32(halves(a, b), halves(c, d)));
    vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))
}
