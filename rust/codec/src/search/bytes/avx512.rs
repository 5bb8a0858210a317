//! AVX-512: 16 blocks at a time for the trials, one number of 32 bits a block.
//!
//! 1. 64 values of a block become a vector of bytes, and 16 such vectors are transposed, so that
//!    each lane of 32 bits has four values of its own block: no sum over lanes is ever needed.
//! 2. `vpermb` looks up 64 values, `vpdpbusd` adds up their products by fours.
//! 3. The exact comparison runs on one block at a time; its vectors of sums are added up by a
//!    transposing tree.

use std::arch::x86_64::*;

use crate::codebook::Codebook;
use crate::search::avx512::{Bins, Tree};
use crate::search::bytes::{search_groups, Best, Errors, Plan, Trial, GROUP, TRIALS};
use crate::values::{Element, Values};
use crate::x86::avx512::{
    bf16_lanes, f16_lanes, lanes, load, load_bf16_in_order, load_f16, load_f32, magnitudes_16_bit,
    magnitudes_f32, max_of_each, sum_of_each,
};
use crate::x86::{prefetch, Plain};

const LANES: usize = 16;
/// Values of a block in a vector of bytes.
const STRIP: usize = 64;
/// How far ahead values are fetched, in bytes: hardware prefetch stops at each page.
const AHEAD: usize = 8192;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    plan: &Plan,
    blocksize: usize,
    scales: &mut [f32],
) -> bool {
    let task = Task { code, plan, blocksize };
    match values {
        Values::F32(values) => task.search(
            values,
            scales,
            |block| magnitudes_f32(block),
            |bits| _mm512_castsi512_ps(bits),
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
#[derive(Clone, Copy)]
struct Task<'a> {
    code: &'a Codebook,
    plan: &'a Plan,
    blocksize: usize,
}

impl Task<'_> {
    /// What depends on the dtype: `magnitudes` reduces a block to 16 lanes of magnitudes that
    /// compare as integers, `widen` makes them floats, `load` reads 16 values in order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn search<T: Element + Plain>(
        self,
        values: &[T],
        scales: &mut [f32],
        magnitudes: impl Fn(&[T]) -> __m512i,
        widen: impl Fn(__m512i) -> __m512,
        load: impl Fn(&[T; LANES]) -> __m512 + Copy,
    ) -> bool {
        let Self { code, plan, blocksize } = self;
        let absmax = |group: &[T]| {
            let mut maxima = [_mm512_setzero_si512(); GROUP];
            for (maximum, block) in maxima.iter_mut().zip(group.chunks_exact(blocksize)) {
                for line in 0..size_of_val(block) / 64 {
                    prefetch(block, AHEAD + 64 * line);
                }
                *maximum = magnitudes(block);
            }
            lanes(widen(max_of_each(&maxima)))
        };
        let best = |group: &[T], factors| self.best(group, &factors, load);
        if let Some(bins) = code.uniform() {
            let bins = Bins::new(bins, code.sorted());
            let errors = |group: &[T], inverse, factors| {
                let (within, nearest) = (|u| bins.nearest_within_one(u), |v| bins.nearest(v));
                self.errors(group, &inverse, &factors, load, within, nearest)
            };
            search_groups((values, T::MAX), plan, blocksize, scales, absmax, best, errors)
        } else {
            let tree = Tree::new(code);
            let errors = |group: &[T], inverse, factors| {
                let nearest = |v| tree.nearest(v);
                self.errors(group, &inverse, &factors, load, nearest, nearest)
            };
            search_groups((values, T::MAX), plan, blocksize, scales, absmax, best, errors)
        }
    }

    /// The best trial of each block of a group.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn best<T>(
        self,
        group: &[T],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; LANES]) -> __m512 + Copy,
    ) -> Best {
        let Self { plan, blocksize, .. } = self;
        let mut sums = [[_mm512_setzero_si512(); 4]; TRIALS];
        for strip in 0..blocksize.div_ceil(STRIP) {
            let mut rows = [_mm512_setzero_si512(); GROUP];
            let blocks = group.chunks_exact(blocksize).zip(factors);
            for (row, (block, factor)) in rows.iter_mut().zip(blocks) {
                let strip = &block[strip * STRIP..];
                *row = bytes(strip, _mm512_set1_ps(*factor), load);
            }
            let columns = transposed(&rows).map(|column| Column::new(column, plan.symmetric));
            // A block of 32 fills half of each 128-bit lane.
            let used = &columns[..GROUP.min(blocksize / 4)];
            let pairs = sums.as_chunks_mut().0.iter_mut().zip(plan.trials.as_chunks().0);
            for (sums, trials) in pairs {
                add_trials(sums, used, trials);
            }
        }
        let mut best = [_mm512_set1_ps(1.0), _mm512_set1_ps(1.0), _mm512_set1_ps(-1.0)];
        let sign = _mm512_set1_ps(plan.sign_of_second());
        for [qc, cc, second_qc, second_cc] in
            sums.map(|sums| sums.map(|sum| _mm512_cvtepi32_ps(sum)))
        {
            best = better(best, qc, cc);
            best = better(best, _mm512_mul_ps(second_qc, sign), second_cc);
        }
        Best { qc: lanes(best[0]), cc: lanes(best[1]) }
    }

    /// The sums of the exact comparison, for two factors a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn errors<T>(
        self,
        group: &[T],
        inverse: &[f32; GROUP],
        factors: &[f32; GROUP],
        load: impl Fn(&[T; LANES]) -> __m512 + Copy,
        nearest_within_one: impl Fn(__m512) -> __m512,
        nearest: impl Fn(__m512) -> __m512,
    ) -> Errors {
        let mut sums = [[_mm512_setzero_ps(); GROUP]; 4];
        for (b, block) in group.chunks_exact(self.blocksize).enumerate() {
            let (inverse, factor) = (_mm512_set1_ps(inverse[b]), _mm512_set1_ps(factors[b]));
            let [mut by_absmax, mut dd, mut dc, mut cc] = [_mm512_setzero_ps(); 4];
            for part in block.as_chunks().0 {
                let u = _mm512_mul_ps(load(part), inverse);
                let v = _mm512_mul_ps(u, factor);
                let d = _mm512_sub_ps(u, nearest_within_one(u));
                by_absmax = _mm512_add_ps(by_absmax, _mm512_mul_ps(d, d));
                let c = nearest(v);
                let d = _mm512_sub_ps(v, c);
                dd = _mm512_add_ps(dd, _mm512_mul_ps(d, d));
                dc = _mm512_add_ps(dc, _mm512_mul_ps(d, c));
                cc = _mm512_add_ps(cc, _mm512_mul_ps(c, c));
            }
            (sums[0][b], sums[1][b], sums[2][b], sums[3][b]) = (by_absmax, dd, dc, cc);
        }
        let [by_absmax, dd, dc, cc] = sums.each_ref().map(|sums| lanes(sum_of_each(sums)));
        Errors { by_absmax, dd, dc, cc }
    }
}

/// 64 values times a factor, rounded to signed bytes; the first 32 lie in the first halves of the
/// 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn bytes<T>(values: &[T], factor: __m512, load: impl Fn(&[T; LANES]) -> __m512) -> __m512i {
    let parts = values.as_chunks().0;
    let part = |i: usize| _mm512_cvtps_epi32(_mm512_mul_ps(load(&parts[i]), factor));
    let first = _mm512_packs_epi32(part(0), part(1));
    let second =
        if parts.len() > 2 { _mm512_packs_epi32(part(2), part(3)) } else { _mm512_setzero_si512() };
    _mm512_packs_epi16(first, second)
}

/// Lane `i` of column `4 j + k` is lane `4 k + j` of row `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn transposed(rows: &[__m512i; GROUP]) -> [__m512i; GROUP] {
    // Lane `j` of each 128-bit lane, of four rows.
    let fours: [[__m512i; 4]; 4] = core::array::from_fn(|i| {
        let [a, b, c, d] = core::array::from_fn(|k| rows[4 * i + k]);
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (more_ab, more_cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(more_ab, more_cd),
            _mm512_unpackhi_epi64(more_ab, more_cd),
        ]
    });
    let mut columns = [_mm512_setzero_si512(); GROUP];
    for (j, columns) in columns.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let [a, b, c, d] = [fours[0][j], fours[1][j], fours[2][j], fours[3][j]];
        let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
        *columns = [
            _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
            _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
        ];
    }
    columns
}

/// Four values of each of 16 blocks.
#[derive(Clone, Copy)]
struct Column {
    magnitude: __m512i,
    /// In the low 6 bits of each byte.
    slot: __m512i,
    /// All bits of a byte where the second table comes first, or none.
    turned: __m512i,
}

impl Column {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn new(q: __m512i, symmetric: bool) -> Self {
        let magnitude = _mm512_abs_epi8(q);
        let negative = if symmetric { 0 } else { _mm512_movepi8_mask(q) };
        Self {
            magnitude,
            slot: _mm512_srli_epi16::<1>(magnitude),
            turned: _mm512_movm_epi8(negative),
        }
    }
}

/// Adds `sum(q c)` and `sum(c c)` of each block by the first scale of a trial, then by the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn add_trials(sums: &mut [[__m512i; 4]; 2], columns: &[Column], trials: &[Trial; 2]) {
    let [a, b] = trials;
    let tables = [
        [load(&a.first.values), load(&a.second.values)],
        [load(&b.first.values), load(&b.second.values)],
    ];
    let mut found = *sums;
    for &Column { magnitude, slot, turned } in columns {
        // Two at a time: each sum waits for its last product.
        for k in 0..2 {
            let first = _mm512_permutexvar_epi8(slot, tables[k][0]);
            let second = _mm512_permutexvar_epi8(slot, tables[k][1]);
            let c = [
                _mm512_ternarylogic_epi32::<0xca>(turned, second, first),
                _mm512_ternarylogic_epi32::<0xca>(turned, first, second),
            ];
            found[k] = [
                _mm512_dpbusd_epi32(found[k][0], magnitude, c[0]),
                _mm512_dpbusd_epi32(found[k][1], c[0], c[0]),
                _mm512_dpbusd_epi32(found[k][2], magnitude, c[1]),
                _mm512_dpbusd_epi32(found[k][3], c[1], c[1]),
            ];
        }
    }
    *sums = found;
}

/// The better of two trials of each block, `sum(q c)`, `sum(c c)` and the first squared, of
/// equal ones the first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn better([best_qc, best_cc, squared]: [__m512; 3], qc: __m512, cc: __m512) -> [__m512; 3] {
    let square = _mm512_mul_ps(qc, qc);
    let (new, old) = (_mm512_mul_ps(square, best_cc), _mm512_mul_ps(squared, cc));
    let better = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(new, old);
    [
        _mm512_mask_mov_ps(best_qc, better, qc),
        _mm512_mask_mov_ps(best_cc, better, cc),
        _mm512_mask_mov_ps(squared, better, square),
    ]
}
