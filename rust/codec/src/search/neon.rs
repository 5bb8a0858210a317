//! NEON: four trials at a time, 4 values at a time.
//!
//! The value nearest to `u` by the binary search of the codes: the place that it ends in looks up a
//! whole float, byte by byte. Sums are added up in the order of the scalar body, so that they have
//! its bits, with importance too.

use std::arch::aarch64::*;

use crate::codebook::Codebook;
use crate::neon::{absmax_f32, load, load_f32, store};
use crate::quantize::neon::Tree;
use crate::search::general::{search_blocks, Sums, ROUND};
use crate::search::{bytes, Way};
use crate::values::{with_slice, Values};

/// Values whose products are summed side by side, as in the scalar body.
const LANES: usize = 16;

/// Finds the scales of whole blocks; tells whether all values were finite.
#[target_feature(enable = "neon")]
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    way: Way<'_>,
    scales: &mut [f32],
) -> bool {
    let importance = match way {
        Way::General(importance) => importance,
        Way::Bytes(plan) => return bytes::neon::search(values, code, plan, blocksize, scales),
    };
    let nearest = Nearest::new(code);
    let absmax = |x: &[f32]| absmax_f32(x);
    let sums = |x: &[f32], w: &[f32], inverses| sums(x, w, inverses, &nearest);
    with_slice!(values, Values, v => {
        search_blocks(v, code, blocksize, importance, scales, absmax, sums)
    })
}

/// The sums of a block, a multiple of 16 values.
#[inline]
#[target_feature(enable = "neon")]
fn sums(x: &[f32], weights: &[f32], inverses: [f32; ROUND], nearest: &Nearest) -> Sums {
    let weights = weights.as_chunks::<LANES>().0;
    let mut sums = Sums::default();
    for (k, inverse) in inverses.into_iter().enumerate() {
        let (mut uc, mut cc) = ([vdupq_n_f32(0.0); 4], [vdupq_n_f32(0.0); 4]);
        for (i, x) in x.as_chunks::<LANES>().0.iter().enumerate() {
            let x = x.as_chunks::<4>().0;
            let weights = weights.get(i).map(|w| w.as_chunks::<4>().0);
            for quarter in 0..4 {
                let u = vmulq_n_f32(load_f32(&x[quarter]), inverse);
                let c = nearest.of(u);
                let (wu, wc) = match weights {
                    Some(w) => {
                        let w = load_f32(&w[quarter]);
                        (vmulq_f32(w, u), vmulq_f32(w, c))
                    }
                    None => (u, c),
                };
                uc[quarter] = vaddq_f32(uc[quarter], vmulq_f32(wu, c));
                cc[quarter] = vaddq_f32(cc[quarter], vmulq_f32(wc, c));
            }
        }
        (sums.uc[k], sums.cc[k]) = (lanes(uc).iter().sum(), lanes(cc).iter().sum());
    }
    sums
}

#[inline]
#[target_feature(enable = "neon")]
fn lanes(vectors: [float32x4_t; 4]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (to, from) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(vectors) {
        store(to, vreinterpretq_u8_f32(from));
    }
    lanes
}

/// Nearest value by a binary search over any 15 ascending bounds.
pub(crate) struct Nearest {
    tree: Tree,
    /// The value of each place of the tree.
    values: uint8x16x4_t,
}

impl Nearest {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn new(code: &Codebook) -> Self {
        let values: [f32; 16] = core::array::from_fn(|i| code.sorted()[Tree::index(i as u8, 4)]);
        let [a, b, c, d] = core::array::from_fn(|i| load(&values.as_chunks::<4>().0[i]));
        Self { tree: Tree::new(code), values: uint8x16x4_t(a, b, c, d) }
    }

    /// The values nearest to `u`.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn of(&self, u: float32x4_t) -> float32x4_t {
        vreinterpretq_f32_u8(vqtbl4q_u8(self.values, self.tree.place(u)))
    }
}
