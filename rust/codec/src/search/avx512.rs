//! AVX-512: four trials at a time, 16 values at a time.
//!
//! The value nearest to `u` comes from uniform bins where the table permits it (see `UniformBins`):
//! a bin has one value below its bound and one above. Any other table takes a binary search. The
//! eight vectors of sums are added up by a transposing tree.

use std::arch::x86_64::*;

use crate::codebook::{Codebook, UniformBins};
use crate::quantize::scalar::absmax_from_bits;
use crate::search::general::{search_blocks, Sums, ROUND};
use crate::search::{bytes, Way};
use crate::values::{with_slice, Values};
use crate::x86::avx512::{clamp_to_one, lanes, load_f32, magnitudes_f32};

const LANES: usize = 16;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    way: Way<'_>,
    scales: &mut [f32],
) -> bool {
    let importance = match way {
        Way::General(importance) => importance,
        Way::Bytes(plan) => return bytes::avx512::search(values, code, plan, blocksize, scales),
    };
    let absmax = |x: &[f32]| absmax_from_bits(_mm512_reduce_max_epu32(magnitudes_f32(x)));
    if let Some(bins) = code.uniform() {
        let bins = Bins::new(bins, code.sorted());
        let sums = |x: &[f32], w: &[f32], inverses| sums(x, w, inverses, |u| bins.nearest(u));
        with_slice!(values, Values, v => {
            search_blocks(v, code, blocksize, importance, scales, absmax, sums)
        })
    } else {
        let tree = Tree::new(code);
        let sums = |x: &[f32], w: &[f32], inverses| sums(x, w, inverses, |u| tree.nearest(u));
        with_slice!(values, Values, v => {
            search_blocks(v, code, blocksize, importance, scales, absmax, sums)
        })
    }
}

/// The sums of a block, a multiple of 16 values.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sums(
    x: &[f32],
    weights: &[f32],
    inverses: [f32; ROUND],
    nearest: impl Fn(__m512) -> __m512,
) -> Sums {
    let inverses = inverses.map(|inverse| _mm512_set1_ps(inverse));
    let mut uc = [_mm512_setzero_ps(); ROUND];
    let mut cc = [_mm512_setzero_ps(); ROUND];
    let x = x.as_chunks::<LANES>().0;
    if weights.is_empty() {
        for x in x {
            let x = load_f32(x);
            for k in 0..ROUND {
                let u = _mm512_mul_ps(x, inverses[k]);
                let c = nearest(u);
                uc[k] = _mm512_fmadd_ps(u, c, uc[k]);
                cc[k] = _mm512_fmadd_ps(c, c, cc[k]);
            }
        }
    } else {
        for (x, w) in x.iter().zip(weights.as_chunks::<LANES>().0) {
            let (x, w) = (load_f32(x), load_f32(w));
            for k in 0..ROUND {
                let u = _mm512_mul_ps(x, inverses[k]);
                let c = nearest(u);
                let wc = _mm512_mul_ps(w, c);
                uc[k] = _mm512_fmadd_ps(u, wc, uc[k]);
                cc[k] = _mm512_fmadd_ps(c, wc, cc[k]);
            }
        }
    }
    sum_each(uc, cc)
}

/// The sum of the lanes of each vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_each(uc: [__m512; ROUND], cc: [__m512; ROUND]) -> Sums {
    // Each step pairs two vectors, half the lanes from each.
    let quarter = |v: [__m512; ROUND]| {
        let halves: [__m512; 2] = core::array::from_fn(|i| {
            let (a, b) = (v[2 * i], v[2 * i + 1]);
            _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
        });
        let [a, b] = halves.map(|v| _mm512_castps_pd(v));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    };
    // Each 128-bit lane now holds a part of all four sums.
    let (a, b) = (quarter(uc), quarter(cc));
    let even = _mm512_shuffle_f32x4::<0x88>(a, b);
    let odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
    let pairs = _mm512_add_ps(even, odd);
    let swapped = _mm512_shuffle_f32x4::<0b10_11_00_01>(pairs, pairs);
    let all = lanes(_mm512_add_ps(pairs, swapped));
    let (uc, cc) = (&all[..ROUND], &all[2 * ROUND..3 * ROUND]);
    Sums { uc: core::array::from_fn(|k| uc[k]), cc: core::array::from_fn(|k| cc[k]) }
}

/// Nearest value by uniform binning.
pub(crate) struct Bins {
    scale: __m512,
    threshold: [__m512; 2],
    below: [__m512; 2],
    above: [__m512; 2],
}

impl Bins {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn new(bins: &UniformBins, sorted: &[f32; 16]) -> Self {
        let value = |slot: usize, more: usize| sorted[(bins.base[slot] as usize + more).min(15)];
        let table = |of: &dyn Fn(usize) -> f32| {
            [0, LANES].map(|first| load_f32(&core::array::from_fn(|lane| of(first + lane))))
        };
        Self {
            scale: _mm512_set1_ps(bins.scale),
            threshold: table(&|slot| bins.threshold[slot]),
            below: table(&|slot| value(slot, 0)),
            above: table(&|slot| value(slot, 1)),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(crate) fn nearest(&self, u: __m512) -> __m512 {
        self.nearest_within_one(clamp_to_one(u))
    }

    /// For values that are within 1 but for some ulps.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(crate) fn nearest_within_one(&self, u: __m512) -> __m512 {
        let magic = _mm512_set1_ps(UniformBins::MAGIC);
        let bin = _mm512_castps_si512(_mm512_fmadd_ps(u, self.scale, magic));
        let threshold = _mm512_permutex2var_ps(self.threshold[0], bin, self.threshold[1]);
        let below = _mm512_permutex2var_ps(self.below[0], bin, self.below[1]);
        let above = _mm512_permutex2var_ps(self.above[0], bin, self.above[1]);
        let is_above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u, threshold);
        _mm512_mask_mov_ps(below, is_above, above)
    }
}

/// Nearest value by a binary search over any 15 ascending bounds.
pub(crate) struct Tree {
    middle: __m512,
    /// `bounds[j + 3]`, `bounds[j + 1]` and `bounds[j]` in lane `j`: what each step looks at.
    steps: [__m512; 3],
    sorted: __m512,
}

impl Tree {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn new(code: &Codebook) -> Self {
        let bounds = code.bounds();
        let from = |first: usize| {
            load_f32(&core::array::from_fn(|j| bounds.get(first + j).copied().unwrap_or(0.0)))
        };
        Self {
            middle: _mm512_set1_ps(bounds[7]),
            steps: [from(3), from(1), from(0)],
            sorted: load_f32(code.sorted()),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn nearest(&self, u: __m512) -> __m512 {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u, self.middle);
        let mut index = _mm512_maskz_set1_epi32(above, 8);
        for (step, bounds) in [4, 2, 1].into_iter().zip(self.steps) {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u, _mm512_permutexvar_ps(index, bounds));
            index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
        }
        _mm512_permutexvar_ps(index, self.sorted)
    }
}
