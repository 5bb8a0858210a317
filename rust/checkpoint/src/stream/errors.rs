//! How far decoded or rounded values are from the exact ones.

use super::job::Errors;

/// Sums that are kept side by side, which is what makes them fast.
const LANES: usize = 16;
/// Values whose squares are added in fp32 before fp64 takes over.
const RUN: usize = 16 * LANES;

impl Errors {
    /// Of `rounded` against `exact`, as many.
    pub(super) fn between(exact: &[f32], rounded: &[f32]) -> Self {
        let mut errors = Self { count: exact.len() as u64, ..Self::default() };
        for (exact, rounded) in exact.chunks(RUN).zip(rounded.chunks(RUN)) {
            let run = short(exact, rounded);
            // Squares of very large values do not fit into fp32.
            errors.add(if run.squared.is_finite() && run.squared_error.is_finite() {
                run
            } else {
                wide(exact, rounded)
            });
        }
        errors
    }

    /// The sum of all parts.
    pub(super) fn sum(parts: &[Self]) -> Self {
        let mut sum = Self::default();
        for part in parts {
            sum.add(*part);
        }
        sum
    }

    fn add(&mut self, part: Self) {
        self.count += part.count;
        self.squared += part.squared;
        self.squared_error += part.squared_error;
        self.max_error = self.max_error.max(part.max_error);
        self.squared_delta += part.squared_delta;
    }
}

/// Of at most `RUN` values, in fp32.
fn short(exact: &[f32], rounded: &[f32]) -> Errors {
    let (mut squared, mut squared_error) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut largest = [0.0f32; LANES];
    for (exact, rounded) in exact.chunks(LANES).zip(rounded.chunks(LANES)) {
        for (lane, (w, d)) in exact.iter().zip(rounded).enumerate() {
            let error = (d - w).abs();
            squared[lane] += w * w;
            squared_error[lane] += error * error;
            // Unlike `max` one instruction.
            largest[lane] = if error > largest[lane] { error } else { largest[lane] };
        }
    }
    let total = |lanes: &[f32]| lanes.iter().map(|sum| f64::from(*sum)).sum();
    Errors {
        squared: total(&squared),
        squared_error: total(&squared_error),
        max_error: largest.iter().fold(0.0, |all, one| f64::from(*one).max(all)),
        ..Errors::default()
    }
}

/// The same in fp64.
fn wide(exact: &[f32], rounded: &[f32]) -> Errors {
    let mut errors = Errors::default();
    for (w, d) in exact.iter().zip(rounded) {
        let (w, d) = (f64::from(*w), f64::from(*d));
        errors.squared += w * w;
        errors.squared_error += (d - w) * (d - w);
        errors.max_error = errors.max_error.max((d - w).abs());
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_those_of_fp64(
            values in proptest::collection::vec((-1.0f32..1.0, -1.0f32..1.0), 0..700),
            scale in prop_oneof![Just(1.0f32), Just(1e-3), Just(1e30)],
        ) {
            let exact: Vec<f32> = values.iter().map(|(w, _)| scale * w).collect();
            let rounded: Vec<f32> = values.iter().map(|(_, d)| scale * d).collect();
            let (found, expected) = (Errors::between(&exact, &rounded), wide(&exact, &rounded));
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b;
            prop_assert_eq!(found.count, exact.len() as u64);
            prop_assert!(close(found.squared, expected.squared));
            prop_assert!(close(found.squared_error, expected.squared_error));
            prop_assert!(close(found.max_error, expected.max_error));
        }
    }
}
