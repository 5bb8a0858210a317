//! Products of every body against sums in f64.

use crate::testing::{Random, Weights};
use crate::{available, Bodies};

/// `x op(w)` and the sums of magnitudes, in f64; `at` is the place in w of (k, j).
fn product(
    (x, m, k): (&[f32], usize, usize),
    (w, n): (&[f32], usize),
    at: impl Fn(usize, usize) -> usize,
) -> Vec<(f64, f64)> {
    let element = |i: usize, j: usize| {
        (0..k).fold((0.0, 0.0), |(sum, size), l| {
            let term = f64::from(x[i * k + l]) * f64::from(w[at(l, j)]);
            (sum + term, size + term.abs())
        })
    };
    (0..m * n).map(|place| element(place / n, place % n)).collect()
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.unit()).collect()
}

/// The sums of both products, started at 0.5.
fn run(bodies: &Bodies, x: &[f32], w: &[f32], (m, k, n): (usize, usize, usize)) -> [Vec<f32>; 2] {
    let mut sums = [vec![0.5; m * n], vec![0.5; m * n]];
    (bodies.floats.nt)(x, w, k, &mut sums[0]);
    (bodies.floats.nn)(x, w, n, &mut sums[1], x);
    sums
}

fn check(m: usize, k: usize, n: usize) {
    let (x, w) = (random(1, m * k), random(2, n * k));
    let nt = product((&x, m, k), (&w, n), |l, j| j * k + l);
    let nn = product((&x, m, k), (&w, n), |l, j| l * n + j);
    for bodies in available() {
        let found = run(bodies, &x, &w, (m, k, n));
        for (kind, (found, expected)) in found.iter().zip([&nt, &nn]).enumerate() {
            for (&sum, (expected, size)) in found.iter().zip(expected) {
                let error = (f64::from(sum) - 0.5 - expected).abs();
                let allowed = 1e-6 * (size + 0.5);
                assert!(error <= allowed, "{} {kind}: {m} {k} {n}: {error:e}", bodies.name());
            }
        }
        assert_eq!(run(bodies, &x, &w, (m, k, n)), found, "it is the same again");
    }
}

#[test]
fn products_of_every_shape_are_right() {
    for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 16, 27, 28, 43] {
        for n in [1, 3, 8, 15, 16, 17, 31, 32, 33, 70] {
            for k in [1, 7, 16, 33] {
                check(m, k, n);
            }
        }
    }
    check(30, 2000, 33);
    check(5, 2001, 64);
}

#[test]
fn nothing_is_added_where_a_side_is_empty() {
    for bodies in available() {
        (bodies.floats.nt)(&[], &[1.0; 6], 3, &mut []);
        (bodies.floats.nn)(&[], &[1.0; 6], 3, &mut [], &[1.0]);
        let mut sums = [0.5; 4];
        (bodies.floats.nt)(&[], &[], 0, &mut sums);
        (bodies.floats.nn)(&[], &[], 2, &mut sums, &[]);
        assert_eq!(sums, [0.5; 4]);
    }
}

#[test]
fn a_square_is_transposed() {
    let square: [[f32; 16]; 16] =
        core::array::from_fn(|i| core::array::from_fn(|j| (16 * i + j) as f32));
    for bodies in available() {
        let mut turned = square;
        (bodies.transpose)(&mut turned);
        for (i, row) in turned.iter().enumerate() {
            let column = square.map(|row| row[i]);
            assert_eq!(*row, column, "{}", bodies.name());
        }
    }
}

#[test]
fn values_are_widened_exactly() {
    for len in [0, 1, 15, 16, 100] {
        let mut values = random(3, len);
        values.iter_mut().skip(3).step_by(7).for_each(|v| *v = f32::INFINITY);
        values.iter_mut().skip(4).step_by(9).for_each(|v| *v = 1e-7);
        for values in Weights::all(&values) {
            for bodies in available() {
                let mut floats = vec![f32::NAN; len];
                (bodies.widen)(values.values(), &mut floats);
                assert_eq!(floats, values.widened(), "{}", bodies.name());
            }
        }
    }
}
