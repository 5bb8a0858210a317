//! The plain body: any machine.

use crate::codebook::Codebook;
use crate::quantize::scalar::block_absmax;
use crate::search::general::{search_blocks, Sums};
use crate::search::{bytes, Way};
use crate::values::{with_slice, Values};

/// Values that are coded together.
const STRIP: usize = 16;

/// Finds the scales of blocks; tells whether all values were finite.
pub(crate) fn search(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    way: Way<'_>,
    scales: &mut [f32],
) -> bool {
    let importance = match way {
        Way::General(importance) => importance,
        Way::Bytes(plan) => {
            return with_slice!(values, Values, v => {
                bytes::scalar::search(v, code, plan, blocksize, scales)
            })
        }
    };
    let steps = Steps::new(code);
    with_slice!(values, Values, v => {
        search_blocks(v, code, blocksize, importance, scales, block_absmax, |x, w, inverses| {
            let mut sums = Sums::default();
            for (k, inverse) in inverses.into_iter().enumerate() {
                (sums.uc[k], sums.cc[k]) = steps.sums(x, w, inverse);
            }
            sums
        })
    })
}

/// The table as a staircase: its lowest value, then where it rises and to what.
pub(crate) struct Steps {
    lowest: f32,
    rises: [(f32, f32); 15],
}

impl Steps {
    pub(crate) fn new(code: &Codebook) -> Self {
        let sorted = code.sorted();
        let rises = core::array::from_fn(|i| (code.bounds()[i], sorted[i + 1]));
        Self { lowest: sorted[0], rises }
    }

    /// The values nearest to `u`.
    #[inline(always)]
    pub(crate) fn nearest<const N: usize>(&self, u: [f32; N]) -> [f32; N] {
        let mut c = [self.lowest; N];
        for (bound, value) in self.rises {
            for (c, u) in c.iter_mut().zip(u) {
                *c = if u > bound { value } else { *c };
            }
        }
        c
    }

    fn sums(&self, x: &[f32], weights: &[f32], inverse: f32) -> (f32, f32) {
        let (mut uc, mut cc) = ([0.0; STRIP], [0.0; STRIP]);
        let mut add = |x: &[f32; STRIP], w: &[f32; STRIP]| {
            let u = x.map(|x| x * inverse);
            let c = self.nearest(u);
            for i in 0..STRIP {
                uc[i] += w[i] * u[i] * c[i];
                cc[i] += w[i] * c[i] * c[i];
            }
        };
        let (strips, rest) = x.as_chunks::<STRIP>();
        let (weight_strips, weight_rest) = weights.as_chunks::<STRIP>();
        let ones = [1.0; STRIP];
        for (i, strip) in strips.iter().enumerate() {
            add(strip, weight_strips.get(i).unwrap_or(&ones));
        }
        if !rest.is_empty() {
            let (mut last, mut w) = ([0.0; STRIP], [0.0; STRIP]); // no weight beyond the end
            last[..rest.len()].copy_from_slice(rest);
            w[..rest.len()].copy_from_slice(if weights.is_empty() {
                &ones[..rest.len()]
            } else {
                weight_rest
            });
            add(&last, &w);
        }
        (uc.iter().sum(), cc.iter().sum())
    }
}
