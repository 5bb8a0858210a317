//! The search with importance, or with a table that has no [`Plan`](crate::search::bytes::Plan):
//! every trial in fp32.
//!
//! ```text
//! c      = the table's values nearest to x / t
//! scale  = sum(w x c) / sum(w c c)            the best one for these codes (least squares)
//! error  = sum(w x x) - sum(w x c)^2 / sum(w c c)
//! ```
//!
//! Trials are multiples of the absmax: first the eight of [`Trials`], then four near the best of
//! those. The error of the absmax itself is among what is compared, so no block gets worse.
//!
//! Everything is computed in units of the absmax, so that no square overflows.

use crate::codebook::Codebook;
use crate::layout::MAX_BLOCKSIZE;
use crate::search::{Importance, SMALLEST};
use crate::values::Element;

/// Blocks whose trials are compared together, in vectors.
const GROUP: usize = 16;
/// Trials whose sums are computed together.
pub(crate) const ROUND: usize = 4;
/// Share of a block's energy that a scale must gain over the absmax: above what sums are off by.
const LEAST_GAIN: f32 = 1e-5;

/// For each trial of a round: `sum(w u c)` and `sum(w c c)`, where `u = x / t`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) uc: [f32; ROUND],
    pub(crate) cc: [f32; ROUND],
}

/// The first trials, as multiples of a block's absmax.
///
/// Chosen greedily for the least error on Gaussian, Laplacian, uniform and real weights. Blocks of
/// more values have rarer extremes, which are cut off sooner; 1.36 puts the extreme on the last
/// value but one. The first trial must be 1.
struct Trials([[f32; ROUND]; 2]);

impl Trials {
    #[inline(always)]
    fn new(code: &Codebook, blocksize: usize) -> Self {
        Self(match (blocksize <= 128, code.is_symmetric()) {
            (true, false) => [[1.0, 0.9, 1.07, 1.36], [-1.0, -0.9, -1.07, -1.36]],
            (false, false) => [[1.0, 0.8, 0.87, 0.94], [-1.0, -0.8, -0.87, -0.94]],
            (true, true) => [[1.0, 0.82, 0.88, 0.94], [0.85, 0.91, 1.06, 1.36]],
            (false, true) => [[1.0, 0.64, 0.7, 0.76], [0.8, 0.84, 0.88, 0.94]],
        })
    }
}

/// The second trials, as multiples of the best of the first.
const NEARBY: [f32; ROUND] = [1.02, 0.98, 1.04, 0.96];

/// The sums of a round for each block of a group.
#[derive(Default)]
struct Round {
    uc: [[f32; GROUP]; ROUND],
    cc: [[f32; GROUP]; ROUND],
}

impl Round {
    #[inline(always)]
    fn set(&mut self, block: usize, sums: Sums) {
        for k in 0..ROUND {
            (self.uc[k][block], self.cc[k][block]) = (sums.uc[k], sums.cc[k]);
        }
    }
}

/// The best trial so far of each block of a group.
struct Best {
    /// What the scale explains of the block's energy, in units of absmax squared.
    explained: [f32; GROUP],
    /// The trial, as a multiple of the absmax.
    trial: [f32; GROUP],
    /// The scale of least squares for the trial's codes, as a multiple of the absmax.
    scale: [f32; GROUP],
}

impl Best {
    #[inline(always)]
    fn new() -> Self {
        Self { explained: [f32::NEG_INFINITY; GROUP], trial: [1.0; GROUP], scale: [1.0; GROUP] }
    }

    /// Compares a round of trials of each block.
    #[inline(always)]
    fn compare(&mut self, round: &Round, trial: impl Fn(usize, usize) -> f32) {
        for k in 0..ROUND {
            for b in 0..GROUP {
                let trial = trial(b, k);
                let (xc, cc) = (trial * round.uc[k][b], round.cc[k][b]);
                let scale = xc / cc;
                let explained = scale * xc;
                // False for NaN, as where no value has a weight or a code other than zero.
                let better = explained > self.explained[b];
                self.explained[b] = if better { explained } else { self.explained[b] };
                self.trial[b] = if better { trial } else { self.trial[b] };
                self.scale[b] = if better { scale } else { self.scale[b] };
            }
        }
    }
}

/// The loop that all bodies share; it is compiled into each, for its instructions.
///
/// `absmax` gives the largest magnitude of a block, NaN if there is one; `sums` those of a block
/// for a round of factors `1 / t`. Weights are as many as the values of the block, or none for
/// ones.
#[inline(always)]
pub(crate) fn search_blocks<T: Element>(
    values: &[T],
    code: &Codebook,
    blocksize: usize,
    importance: Option<Importance<'_>>,
    scales: &mut [f32],
    absmax: impl Fn(&[f32]) -> f32,
    sums: impl Fn(&[f32], &[f32], [f32; ROUND]) -> Sums,
) -> bool {
    let Trials(first) = Trials::new(code, blocksize);
    let inverse_first = first.map(|trials| trials.map(|trial| 1.0 / trial));
    let inverse_nearby = NEARBY.map(|near| 1.0 / near);
    let largest_code = code.sorted().iter().fold(0.0_f32, |a, v| a.max(v.abs()));
    let (mut room, mut weights) = ([0.0; MAX_BLOCKSIZE], [0.0; MAX_BLOCKSIZE]);
    let mut finite = true;
    let groups = values.chunks(GROUP * blocksize).zip(scales.chunks_mut(GROUP));
    for (g, (group, scales)) in groups.enumerate() {
        let place = |b: usize| (g * GROUP + b) * blocksize;
        let mut inverse = [0.0; GROUP];
        let mut found = [Round::default(), Round::default()];
        for (b, (block, scale)) in group.chunks(blocksize).zip(scales.iter_mut()).enumerate() {
            let wide = T::widened(block, &mut room);
            let weights = Importance::of_block(importance, place(b), wide.len(), &mut weights);
            *scale = absmax(wide);
            finite &= scale.is_finite();
            inverse[b] = if *scale >= SMALLEST { 1.0 / *scale } else { 0.0 };
            for (found, trials) in found.iter_mut().zip(inverse_first) {
                found.set(b, sums(wide, weights, trials.map(|trial| inverse[b] * trial)));
            }
        }
        let mut best = Best::new();
        for (found, trials) in found.iter().zip(first) {
            best.compare(found, |_, k| trials[k]);
        }

        let middle = best.trial;
        let inverse: [f32; GROUP] = core::array::from_fn(|b| inverse[b] / middle[b]);
        let mut nearby = Round::default();
        for (b, block) in group.chunks(blocksize).enumerate() {
            let wide = T::widened(block, &mut room);
            let weights = Importance::of_block(importance, place(b), wide.len(), &mut weights);
            nearby.set(b, sums(wide, weights, inverse_nearby.map(|near| inverse[b] * near)));
        }
        best.compare(&nearby, |b, k| middle[b] * NEARBY[k]);

        for (b, scale) in scales.iter_mut().enumerate() {
            // The first trial is the absmax itself: what it explains with a scale of 1.
            let (xc, cc) = (found[0].uc[0][b], found[0].cc[0][b]);
            let gains = best.explained[b] - (2.0 * xc - cc) > LEAST_GAIN * cc;
            let better = *scale * best.scale[b];
            let fits = better.abs() * largest_code <= T::MAX;
            if gains && fits && *scale >= SMALLEST {
                *scale = better;
            }
        }
    }
    finite
}
