//! AVX2: four trials at a time, 8 values at a time.
//!
//! The value nearest to `u` by a binary search: the bounds that a step can look at fit one
//! `vpermps`, and so do the values that the last step leaves.

use std::arch::x86_64::*;

use crate::codebook::Codebook;
use crate::quantize::scalar::absmax_from_bits;
use crate::search::general::{search_blocks, Sums, ROUND};
use crate::search::{bytes, Way};
use crate::values::{with_slice, Values};
use crate::x86::avx2::{lanes, load_f32, magnitudes_f32, max_of_each};

const LANES: usize = 8;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    way: Way<'_>,
    scales: &mut [f32],
) -> bool {
    let importance = match way {
        Way::General(importance) => importance,
        Way::Bytes(plan) => return bytes::avx2::search(values, code, plan, blocksize, scales),
    };
    let absmax = |x: &[f32]| {
        let maxima = max_of_each(&[magnitudes_f32(x); LANES]);
        absmax_from_bits(_mm256_extract_epi32::<0>(maxima) as u32)
    };
    let tree = Tree::new(code);
    let sums = |x: &[f32], w: &[f32], inverses| sums(x, w, inverses, &tree);
    with_slice!(values, Values, v => {
        search_blocks(v, code, blocksize, importance, scales, absmax, sums)
    })
}

/// The sums of a block, a multiple of 8 values.
#[inline]
#[target_feature(enable = "avx2")]
fn sums(x: &[f32], weights: &[f32], inverses: [f32; ROUND], tree: &Tree) -> Sums {
    let inverses = inverses.map(|inverse| _mm256_set1_ps(inverse));
    let mut uc = [_mm256_setzero_ps(); ROUND];
    let mut cc = [_mm256_setzero_ps(); ROUND];
    let weights = weights.as_chunks::<LANES>().0;
    for (i, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
        let x = load_f32(x);
        for k in 0..ROUND {
            let u = _mm256_mul_ps(x, inverses[k]);
            let c = tree.nearest(u);
            let wc = weights.get(i).map_or(c, |w| _mm256_mul_ps(load_f32(w), c));
            uc[k] = _mm256_add_ps(uc[k], _mm256_mul_ps(u, wc));
            cc[k] = _mm256_add_ps(cc[k], _mm256_mul_ps(c, wc));
        }
    }
    Sums { uc: uc.map(|v| lanes(v).iter().sum()), cc: cc.map(|v| lanes(v).iter().sum()) }
}

/// Nearest value by a binary search over any 15 ascending bounds.
pub(crate) struct Tree {
    middle: __m256,
    /// The bounds that the other steps look at; lane `-i & 7` for partial index `i`.
    steps: [__m256; 3],
    /// The values at even and at odd indices `2 i` and `2 i + 1`; lane `-i & 7`.
    sorted: [__m256; 2],
}

impl Tree {
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) fn new(code: &Codebook) -> Self {
        let bounds = code.bounds();
        // A comparison gives -1, so that a partial index comes out negated.
        let table = |of: &dyn Fn(usize) -> f32| {
            load_f32(&core::array::from_fn(|lane| of((LANES - lane) % LANES)))
        };
        let step = |first: usize, width: usize| {
            table(&|i| bounds.get(first + width * i).copied().unwrap_or(0.0))
        };
        Self {
            middle: _mm256_set1_ps(bounds[7]),
            steps: [step(3, 8), step(1, 4), step(0, 2)],
            sorted: [table(&|i| code.sorted()[2 * i]), table(&|i| code.sorted()[2 * i + 1])],
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(crate) fn nearest(&self, u: __m256) -> __m256 {
        let above = |bound| _mm256_cmp_ps::<_CMP_GT_OQ>(u, bound);
        let [second, third, last] = self.steps;
        let mut minus = _mm256_castps_si256(above(self.middle));
        for bounds in [second, third] {
            let higher = above(_mm256_permutevar8x32_ps(bounds, minus));
            minus = _mm256_add_epi32(_mm256_add_epi32(minus, minus), _mm256_castps_si256(higher));
        }
        let odd = above(_mm256_permutevar8x32_ps(last, minus));
        let [even, other] = self.sorted.map(|values| _mm256_permutevar8x32_ps(values, minus));
        _mm256_blendv_ps(even, other, odd)
    }
}
