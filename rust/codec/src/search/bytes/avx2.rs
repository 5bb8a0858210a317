//! AVX2: 8 blocks at a time for the trials, one number of 32 bits a block.
//!
//! As the AVX-512 body, with 32 values of a block in a vector. The lookups are staircases: `vpshufb`
//! knows 16 bins, each with a value below its place and one from there on.

use std::arch::x86_64::*;

use crate::codebook::Codebook;
use crate::search::avx2::Tree;
use crate::search::bytes::{search_groups, Best, Errors, Plan, Side, Trial, GROUP, TRIALS};
use crate::values::{Element, Values};
use crate::x86::avx2::{
    bf16_lanes, f16_lanes, lanes, load_bf16_in_order, load_f16, load_f32, load_half,
    magnitudes_16_bit, magnitudes_f32, max_of_each, sum_of_each,
};
use crate::x86::Plain;

const LANES: usize = 8;
/// Values of a block in a vector of bytes.
const STRIP: usize = 32;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    plan: &Plan,
    blocksize: usize,
    scales: &mut [f32],
) -> bool {
    let task = Task { plan, blocksize, tree: Tree::new(code) };
    match values {
        Values::F32(values) => task.search(
            values,
            scales,
            |block| magnitudes_f32(block),
            |bits| _mm256_castsi256_ps(bits),
            |part| load_f32(part),
        ),
        Values::F16(values) => task.search(
            values,
            scales,
            |block| magnitudes_16_bit(block),
            |bits| f16_lanes(bits),
            |part| load_f16(part),
        ),
        Values::Bf16(values) => task.search(
            values,
            scales,
            |block| magnitudes_16_bit(block),
            |bits| bf16_lanes(bits),
            |part| load_bf16_in_order(part),
        ),
    }
}

/// What stays the same for all groups.
struct Task<'a> {
    plan: &'a Plan,
    blocksize: usize,
    tree: Tree,
}

impl Task<'_> {
    /// What depends on the dtype: `magnitudes` reduces a block to 8 lanes of magnitudes that
    /// compare as integers, `widen` makes them floats, `load` reads 8 values in order.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn search<T: Element + Plain>(
        &self,
        values: &[T],
        scales: &mut [f32],
        magnitudes: impl Fn(&[T]) -> __m256i,
        widen: impl Fn(__m256i) -> __m256,
        load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    ) -> bool {
        let blocksize = self.blocksize;
        let absmax = |group: &[T]| {
            let mut maxima = [_mm256_setzero_si256(); GROUP];
            for (maximum, block) in maxima.iter_mut().zip(group.chunks_exact(blocksize)) {
                *maximum = magnitudes(block);
            }
            let [first, second] = halves(&maxima).map(|maxima| lanes(widen(max_of_each(maxima))));
            joined(first, second)
        };
        let best = |group: &[T], factors| self.best(group, &factors, load);
        let errors = |group: &[T], inverse, factors| self.errors(group, &inverse, &factors, load);
        let task = (values, T::MAX);
        search_groups(task, self.plan, blocksize, scales, absmax, best, errors)
    }

    /// The best trial of each block of a group.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn best<T>(
        &self,
        group: &[T],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    ) -> Best {
        let mut found = [[[0.0; LANES]; 2]; 2];
        let groups = group.chunks(LANES * self.blocksize).zip(halves(factors));
        for (found, (blocks, factors)) in found.iter_mut().zip(groups) {
            *found = self.best_of_8(blocks, factors, load).map(|sum| lanes(sum));
        }
        let [[qc, cc], [more_qc, more_cc]] = found;
        Best { qc: joined(qc, more_qc), cc: joined(cc, more_cc) }
    }

    /// `sum(q c)` and `sum(c c)` of the best trial of each of 8 blocks.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn best_of_8<T>(
        &self,
        blocks: &[T],
        factors: &[f32; LANES],
        load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    ) -> [__m256; 2] {
        let Self { plan, blocksize, .. } = *self;
        let mut sums = [[_mm256_setzero_si256(); 4]; TRIALS];
        for strip in 0..blocksize / STRIP {
            let mut rows = [_mm256_setzero_si256(); LANES];
            let blocks = blocks.chunks_exact(blocksize).zip(factors);
            for (row, (block, factor)) in rows.iter_mut().zip(blocks) {
                *row = bytes(&block[strip * STRIP..], _mm256_set1_ps(*factor), load);
            }
            let columns = transposed(&rows).map(|column| Column::new(column, plan.symmetric));
            for (sums, trial) in sums.iter_mut().zip(&plan.trials) {
                add_trial(sums, &columns, trial);
            }
        }
        let mut best = [_mm256_set1_ps(1.0), _mm256_set1_ps(1.0), _mm256_set1_ps(-1.0)];
        let sign = _mm256_set1_ps(plan.sign_of_second());
        for sums in sums {
            let [qc, cc, second_qc, second_cc] = sums.map(|sum| _mm256_cvtepi32_ps(sum));
            best = better(best, qc, cc);
            best = better(best, _mm256_mul_ps(second_qc, sign), second_cc);
        }
        [best[0], best[1]]
    }

    /// The sums of the exact comparison, for two factors a block.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn errors<T>(
        &self,
        group: &[T],
        inverse: &[f32; GROUP],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    ) -> Errors {
        // Lanes 0 to 7 and 8 to 15 of 16.
        let mut sums = [[[_mm256_setzero_ps(); GROUP]; 2]; 4];
        for (b, block) in group.chunks_exact(self.blocksize).enumerate() {
            let (inverse, factor) = (_mm256_set1_ps(inverse[b]), _mm256_set1_ps(factors[b]));
            let mut block_sums = [[_mm256_setzero_ps(); 2]; 4];
            for parts in block.as_chunks().0.as_chunks::<2>().0 {
                for (half, part) in parts.iter().enumerate() {
                    let u = _mm256_mul_ps(load(part), inverse);
                    let v = _mm256_mul_ps(u, factor);
                    let from_absmax = _mm256_sub_ps(u, self.tree.nearest(u));
                    let c = self.tree.nearest(v);
                    let d = _mm256_sub_ps(v, c);
                    let pairs = [(from_absmax, from_absmax), (d, d), (d, c), (c, c)];
                    for (sums, (a, b)) in block_sums.iter_mut().zip(pairs) {
                        sums[half] = _mm256_add_ps(sums[half], _mm256_mul_ps(a, b));
                    }
                }
            }
            for (sums, block_sums) in sums.iter_mut().zip(block_sums) {
                (sums[0][b], sums[1][b]) = (block_sums[0], block_sums[1]);
            }
        }
        let [by_absmax, dd, dc, cc] = sums.each_ref().map(|[low, high]| {
            let [[a, b], [c, d]] = [halves(low), halves(high)];
            let first = _mm256_add_ps(sum_of_each(a), sum_of_each(c));
            let second = _mm256_add_ps(sum_of_each(b), sum_of_each(d));
            joined(lanes(first), lanes(second))
        });
        Errors { by_absmax, dd, dc, cc }
    }
}

fn halves<T>(all: &[T; GROUP]) -> [&[T; LANES]; 2] {
    let halves = all.as_chunks().0;
    [&halves[0], &halves[1]]
}

fn joined(first: [f32; LANES], second: [f32; LANES]) -> [f32; GROUP] {
    core::array::from_fn(|i| if i < LANES { first[i] } else { second[i - LANES] })
}

/// 32 values times a factor, rounded to signed bytes, in any order.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn bytes<T>(values: &[T], factor: __m256, load: impl Fn(&[T; LANES]) -> __m256) -> __m256i {
    let parts = values.as_chunks().0;
    let part = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(load(&parts[i]), factor));
    let first = _mm256_packs_epi32(part(0), part(1));
    _mm256_packs_epi16(first, _mm256_packs_epi32(part(2), part(3)))
}

/// Lane `i` of each column is of row `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn transposed(rows: &[__m256i; LANES]) -> [__m256i; LANES] {
    // Lane `j` of each 128-bit lane, of four rows.
    let fours: [[__m256i; 4]; 2] = core::array::from_fn(|i| {
        let [a, b, c, d] = core::array::from_fn(|k| rows[4 * i + k]);
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (more_ab, more_cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(more_ab, more_cd),
            _mm256_unpackhi_epi64(more_ab, more_cd),
        ]
    });
    let [a, b] = fours;
    core::array::from_fn(|i| {
        if i < 4 {
            _mm256_permute2x128_si256::<0x20>(a[i], b[i])
        } else {
            _mm256_permute2x128_si256::<0x31>(a[i - 4], b[i - 4])
        }
    })
}

/// Four values of each of 8 blocks.
#[derive(Clone, Copy)]
struct Column {
    magnitude: __m256i,
    slot: __m256i,
    bin: __m256i,
    /// All bits of a byte where the second table comes first, or none.
    turned: __m256i,
}

impl Column {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(q: __m256i, symmetric: bool) -> Self {
        let magnitude = _mm256_abs_epi8(q);
        let zero = _mm256_setzero_si256();
        // Bits of the next byte come in above.
        let masked = |v, bits| _mm256_and_si256(v, _mm256_set1_epi8(bits));
        Self {
            magnitude,
            slot: masked(_mm256_srli_epi16::<1>(magnitude), 63),
            bin: masked(_mm256_srli_epi16::<3>(magnitude), 15),
            turned: if symmetric { zero } else { _mm256_cmpgt_epi8(zero, q) },
        }
    }
}

/// Adds `sum(q c)` and `sum(c c)` of each block by the first scale of a trial, then by the second.
#[inline]
#[target_feature(enable = "avx2")]
fn add_trial(sums: &mut [__m256i; 4], columns: &[Column], trial: &Trial) {
    let sides = [Staircase::new(&trial.first), Staircase::new(&trial.second)];
    let ones = _mm256_set1_epi16(1);
    let dot = |sum, a, b| {
        let pairs = _mm256_maddubs_epi16(a, b); // at most 2 x 127 x 127
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones))
    };
    let mut found = *sums;
    for column in columns {
        let [first, second] = [sides[0].values(column), sides[1].values(column)];
        let differ = _mm256_and_si256(_mm256_xor_si256(first, second), column.turned);
        let (c, other) = (_mm256_xor_si256(first, differ), _mm256_xor_si256(second, differ));
        found = [
            dot(found[0], column.magnitude, c),
            dot(found[1], c, c),
            dot(found[2], column.magnitude, other),
            dot(found[3], other, other),
        ];
    }
    *sums = found;
}

/// The steps of a side, twice.
struct Staircase {
    low: __m256i,
    last_low: __m256i,
    rise: __m256i,
}

impl Staircase {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(side: &Side) -> Self {
        let twice = |bytes: &[u8; 16]| _mm256_broadcastsi128_si256(load_half(bytes));
        let steps = &side.steps;
        Self { low: twice(&steps.low), last_low: twice(&steps.last_low), rise: twice(&steps.rise) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn values(&self, column: &Column) -> __m256i {
        let of_bin = |table| _mm256_shuffle_epi8(table, column.bin);
        let high = _mm256_cmpgt_epi8(column.slot, of_bin(self.last_low));
        _mm256_add_epi8(of_bin(self.low), _mm256_and_si256(high, of_bin(self.rise)))
    }
}

/// The better of two trials of each block, `sum(q c)`, `sum(c c)` and the first squared, of equal
/// ones the first.
#[inline]
#[target_feature(enable = "avx2")]
fn better([best_qc, best_cc, squared]: [__m256; 3], qc: __m256, cc: __m256) -> [__m256; 3] {
    let square = _mm256_mul_ps(qc, qc);
    let (new, old) = (_mm256_mul_ps(square, best_cc), _mm256_mul_ps(squared, cc));
    let better = _mm256_cmp_ps::<_CMP_GT_OQ>(new, old);
    [
        _mm256_blendv_ps(best_qc, qc, better),
        _mm256_blendv_ps(best_cc, cc, better),
        _mm256_blendv_ps(squared, square, better),
    ]
}
