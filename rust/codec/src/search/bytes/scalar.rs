//! The plain body: any machine, blocks of any length.

use crate::codebook::{Codebook, UniformBins};
use crate::quantize::scalar::block_absmax;
use crate::search::bytes::{search_groups, sum, Best, Errors, Plan, Trial, GROUP, SLOTS, TRIALS};
use crate::search::scalar::Steps;
use crate::values::Element;

/// Values whose squares are summed side by side.
const LANES: usize = 16;
/// Values that are read together: the largest number that any `room` here holds.
const STRIP: usize = 64;

/// Finds the scales of blocks; tells whether all values were finite.
pub(crate) fn search<T: Element>(
    values: &[T],
    code: &Codebook,
    plan: &Plan,
    blocksize: usize,
    scales: &mut [f32],
) -> bool {
    let steps = Steps::new(code);
    let absmax = |group: &[T]| {
        of_each(group.chunks(blocksize), |block| {
            let strips = widened(block).map(|(strip, len)| block_absmax(&strip[..len]));
            strips.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
        })
    };
    let best = |group: &[T], factors: [f32; GROUP]| {
        let blocks = group.chunks(blocksize).zip(factors);
        let best = of_each(blocks, |(block, factor)| best(&trial_sums(block, factor, plan), plan));
        Best { qc: best.map(|best| best.0), cc: best.map(|best| best.1) }
    };
    let errors = |group: &[T], inverse: [f32; GROUP], factors: [f32; GROUP]| {
        let blocks = group.chunks(blocksize).zip(inverse.into_iter().zip(factors));
        let sums = of_each(blocks, |(block, factors)| block_errors(block, factors, &steps));
        let lanes = |i: usize| sums.map(|sums| sums[i]);
        Errors { by_absmax: lanes(0), dd: lanes(1), dc: lanes(2), cc: lanes(3) }
    };
    search_groups((values, T::MAX), plan, blocksize, scales, absmax, best, errors)
}

/// What `of` makes of each item, and the default where there is none.
fn of_each<I, R: Copy + Default>(
    items: impl Iterator<Item = I>,
    of: impl Fn(I) -> R,
) -> [R; GROUP] {
    let mut all = [R::default(); GROUP];
    all.iter_mut().zip(items).for_each(|(to, item)| *to = of(item));
    all
}

/// Strips of a block as floats, with zeros beyond the end, and their lengths.
fn widened<T: Element>(block: &[T]) -> impl Iterator<Item = ([f32; STRIP], usize)> + '_ {
    block.chunks(STRIP).map(|strip| {
        let mut wide = [0.0; STRIP];
        T::widen(strip, &mut wide[..strip.len()]);
        (wide, strip.len())
    })
}

/// For each trial: `sum(q c)` and `sum(c c)` by its first scale, then by its second.
fn trial_sums<T: Element>(block: &[T], factor: f32, plan: &Plan) -> [[i32; 4]; TRIALS] {
    let mut sums = [[0; 4]; TRIALS];
    for (strip, len) in widened(block) {
        let q = strip.map(|x| rounded(x * factor));
        for (sums, Trial { first, second }) in sums.iter_mut().zip(&plan.trials) {
            for &q in &q[..len] {
                let magnitude = q.abs();
                let slot = magnitude as usize / 2 % SLOTS;
                let c = [first.values[slot].into(), second.values[slot].into()];
                let [c, other]: [i32; 2] = if q < 0 && !plan.symmetric { [c[1], c[0]] } else { c };
                sums[0] += magnitude * c;
                sums[1] += c * c;
                sums[2] += magnitude * other;
                sums[3] += other * other;
            }
        }
    }
    sums
}

/// `sum(q c)`, negative for a negative scale, and `sum(c c)` of the best trial.
fn best(sums: &[[i32; 4]; TRIALS], plan: &Plan) -> (f32, f32) {
    let (mut best_qc, mut best_cc, mut squared) = (1.0, 1.0, -1.0);
    for sums in sums {
        let [qc, cc, other_qc, other_cc] = sums.map(|sum| sum as f32);
        for (qc, cc) in [(qc, cc), (other_qc * plan.sign_of_second(), other_cc)] {
            // Of fractions, without dividing.
            if qc * qc * best_cc > squared * cc {
                (best_qc, best_cc, squared) = (qc, cc, qc * qc);
            }
        }
    }
    (best_qc, best_cc)
}

/// The nearest integer, ties to even; 0 for NaN, as infinity times 0 is.
fn rounded(x: f32) -> i32 {
    const MAGIC: f32 = UniformBins::MAGIC; // no call, where there is no instruction for it
    let x = if x.is_nan() { 0.0 } else { x };
    ((x + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits())).cast_signed()
}

/// The sums of [`Errors`], in its order.
fn block_errors<T: Element>(block: &[T], (inverse, factor): (f32, f32), steps: &Steps) -> [f32; 4] {
    let mut sums = [[0.0; LANES]; 4];
    for (strip, _) in widened(block) {
        // Beyond the end all is 0: the table has this value.
        for x in strip.as_chunks::<LANES>().0 {
            let u = x.map(|x| x * inverse);
            let v = u.map(|u| u * factor);
            let (by_absmax, c) = (steps.nearest(u), steps.nearest(v));
            for i in 0..LANES {
                let (from_absmax, d) = (u[i] - by_absmax[i], v[i] - c[i]);
                sums[0][i] += from_absmax * from_absmax;
                sums[1][i] += d * d;
                sums[2][i] += d * c[i];
                sums[3][i] += c[i] * c[i];
            }
        }
    }
    sums.map(sum)
}
