//! The search without importance: trials in integers of 7 bits, then one exact comparison.
//!
//! ```text
//! q      = round(127 x / absmax)                                  7 bits and a sign
//! c      = 127 times the table's value nearest to x / t           looked up by q, in steps of 2
//! scale  = sum(q c) / sum(c c), of the trial t with the greatest sum(q c)^2 / sum(c c)
//! ```
//!
//! Trials are multiples of the absmax, so that what `q` looks up is the same for every block. The
//! trials `t` and `-t` share their lookups: where one takes the value nearest to `|x| / |t|`, the
//! other takes the one nearest to `-|x| / |t|`.
//!
//! Then once more, in fp32, with `v = x / scale`, `c` the nearest to `v`, and `d = v - c`:
//!
//! ```text
//! refined = scale (1 + sum(d c) / sum(c c))                       least squares again
//! error   = scale^2 (sum(d d) - sum(d c)^2 / sum(c c))
//! ```
//!
//! The block keeps its absmax unless this error is below that of the absmax by more than rounding
//! could be off. Integer sums have no order and those of floats have a fixed one ([`sum`]), so that
//! all bodies find the same scales.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;

use crate::codebook::Codebook;
use crate::search::SMALLEST;

/// Blocks whose scales are computed together.
pub(crate) const GROUP: usize = 16;
/// Pairs of trial scales.
pub(crate) const TRIALS: usize = 6;
/// What stands for 1 in `q` and `c`.
const ONE: f32 = 127.0;
/// Entries of a lookup table.
pub(crate) const SLOTS: usize = 64;
/// Slots that hold two values at most.
const BIN: usize = 4;

/// The trials of a table and a block size.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) trials: [Trial; TRIALS],
    /// Whether the sign of a scale changes nothing.
    pub(crate) symmetric: bool,
    largest_code: f32,
}

impl Plan {
    /// What the second scale of each trial is to be multiplied with.
    #[inline(always)]
    pub(crate) fn sign_of_second(&self) -> f32 {
        if self.symmetric {
            1.0
        } else {
            -1.0
        }
    }
}

/// Two trial scales: `t` and `-t`, or where the sign changes nothing, two of different magnitudes.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    /// For the first scale; of `t` and `-t`, where `x / t` is positive.
    pub(crate) first: Side,
    /// For the second scale; of `t` and `-t`, where `x / t` is negative.
    pub(crate) second: Side,
}

/// The magnitude of `c` for each `|q| / 2`, as a table and as a staircase.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) values: [u8; SLOTS],
    pub(crate) steps: Steps,
}

/// For each bin of slots: its first value, the last slot of that, and how much more come after it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Steps {
    pub(crate) low: [u8; SLOTS / BIN],
    pub(crate) last_low: [u8; SLOTS / BIN],
    pub(crate) rise: [u8; SLOTS / BIN],
}

impl Plan {
    /// None if a value of the table is beyond [-1, 1], or none is 0: signs may then differ between
    /// `q` and `c`.
    pub(crate) fn new(code: &Codebook, blocksize: usize) -> Option<Self> {
        let sorted = code.sorted();
        let largest_code = sorted.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
        if largest_code > 1.0 || !sorted.contains(&0.0) {
            return None;
        }
        let levels = sorted.map(|v| (v * ONE).abs().round_ties_even() as u8);
        let trials = core::array::from_fn(|i| {
            let [first, second] = if code.is_symmetric() {
                [2 * i, 2 * i + 1].map(|i| symmetric_multiples(blocksize)[i])
            } else {
                let multiple = multiples(blocksize)[i];
                [multiple, -multiple]
            };
            Trial {
                first: Side::new(code, &levels, first),
                second: Side::new(code, &levels, second),
            }
        });
        Some(Self { trials, symmetric: code.is_symmetric(), largest_code })
    }
}

/// The magnitudes of trials, as multiples of a block's absmax.
///
/// Chosen greedily for the least error on Gaussian, Laplacian, Student, uniform and real weights.
/// Blocks of more values have rarer extremes, which are cut off sooner; some 1.3 puts the extreme
/// on the last value but one.
fn multiples(blocksize: usize) -> [f32; TRIALS] {
    match blocksize {
        ..=64 => [0.9, 0.96, 1.02, 1.08, 1.3, 1.38],
        65..=128 => [0.86, 0.92, 0.98, 1.02, 1.06, 1.32],
        129..=512 => [0.8, 0.86, 0.9, 0.94, 1.02, 1.3],
        _ => [0.62, 0.7, 0.76, 0.82, 0.9, 1.3],
    }
}

/// The same where the sign of a scale changes nothing.
fn symmetric_multiples(blocksize: usize) -> [f32; 2 * TRIALS] {
    match blocksize {
        ..=128 => [0.78, 0.82, 0.86, 0.9, 0.94, 0.98, 1.04, 1.14, 1.28, 1.34, 1.4, 1.46],
        129..=512 => [0.66, 0.72, 0.76, 0.78, 0.8, 0.82, 0.86, 0.9, 0.96, 1.34, 1.4, 1.52],
        _ => [0.5, 0.54, 0.58, 0.64, 0.66, 0.7, 0.74, 0.78, 0.84, 0.88, 1.36, 1.52],
    }
}

impl Side {
    fn new(code: &Codebook, levels: &[u8; 16], multiple: f32) -> Self {
        let (bounds, mut index) = (code.bounds(), 7);
        let mut values = core::array::from_fn(|slot| {
            let u = (2.0 * slot as f32 + 0.5) / ONE / multiple; // of `q` = 2 slot and 2 slot + 1
            while index < 15 && bounds[index] < u {
                index += 1;
            }
            while index > 0 && bounds[index - 1] >= u {
                index -= 1;
            }
            levels[index]
        });
        values[0] = 0; // of the zeros, too, that fill a vector up
        let mut steps = Steps::default();
        for (bin, values) in values.chunks_mut(BIN).enumerate() {
            let (low, high) = (values[0], values[BIN - 1]);
            let place = values.iter().take_while(|&&v| v == low || v - low < high - v).count();
            values[..place].fill(low);
            values[place..].fill(high);
            steps.low[bin] = low;
            steps.last_low[bin] = (bin * BIN + place - 1) as u8;
            steps.rise[bin] = high - low;
        }
        Self { values, steps }
    }
}

/// The best trial of each block of a group: of two that are equally good, the first.
pub(crate) struct Best {
    /// `sum(q c)`, negative for a negative scale.
    pub(crate) qc: [f32; GROUP],
    pub(crate) cc: [f32; GROUP],
}

/// The sums of the exact comparison, for each block of a group.
#[derive(Default)]
pub(crate) struct Errors {
    /// `sum(d d)` by the absmax, in units of it.
    pub(crate) by_absmax: [f32; GROUP],
    /// `sum(d d)`, `sum(d c)` and `sum(c c)` by the scale found, in units of that.
    pub(crate) dd: [f32; GROUP],
    pub(crate) dc: [f32; GROUP],
    pub(crate) cc: [f32; GROUP],
}

/// The loop that all bodies share; it is compiled into each, for its instructions.
///
/// Of the blocks of a group, `absmax` gives the largest magnitudes, NaN if there is one; `best` the
/// best trial for values times a factor a block; `errors` the sums for two factors a block, `1 /
/// absmax` and `absmax / scale`.
#[inline(always)]
pub(crate) fn search_groups<T>(
    (values, max): (&[T], f32),
    plan: &Plan,
    blocksize: usize,
    scales: &mut [f32],
    absmax: impl Fn(&[T]) -> [f32; GROUP],
    best: impl Fn(&[T], [f32; GROUP]) -> Best,
    errors: impl Fn(&[T], [f32; GROUP], [f32; GROUP]) -> Errors,
) -> bool {
    let mut finite = true;
    for (group, scales) in values.chunks(GROUP * blocksize).zip(scales.chunks_mut(GROUP)) {
        let absmax = absmax(group);
        let usable = absmax.map(|a| (SMALLEST..f32::INFINITY).contains(&a));
        let inverse = core::array::from_fn(|b| if usable[b] { 1.0 / absmax[b] } else { 0.0 });
        let best = best(group, inverse.map(|inverse| inverse * ONE));
        let found: [f32; GROUP] = core::array::from_fn(|b| best.qc[b] / best.cc[b]);
        let sums = errors(group, inverse, found.map(|scale| 1.0 / scale));
        // All lanes alike, and only then those there are: so it is done in vectors.
        let kept: [f32; GROUP] = core::array::from_fn(|b| {
            let more = sums.dc[b] / sums.cc[b];
            let error = found[b] * found[b] * (sums.dd[b] - more * sums.dc[b]);
            // Values and differences of them are off by 2^-23 each, at the most.
            let gains = error * (1.0 + 1.0 / 512.0) + blocksize as f32 * 1e-10 < sums.by_absmax[b];
            let refined = absmax[b] * (found[b] + found[b] * more);
            let fits = refined.abs() * plan.largest_code <= max;
            if usable[b] & gains & fits {
                refined
            } else {
                absmax[b]
            }
        });
        scales.copy_from_slice(&kept[..scales.len()]);
        finite &= absmax.iter().all(|a| a.is_finite());
    }
    finite
}

/// The sum of 16 lanes, in the order in which vectors of them are added up.
#[inline(always)]
pub(crate) fn sum(lanes: [f32; 16]) -> f32 {
    let quarter = |i: usize| (lanes[i] + lanes[i + 2]) + (lanes[i + 1] + lanes[i + 3]);
    (quarter(0) + quarter(4)) + (quarter(8) + quarter(12))
}
