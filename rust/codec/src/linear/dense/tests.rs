//! Products of every body against sums in f64.

use half::bf16;

use crate::linear::dense::terms::{terms, Pair, Products};
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

/// Rows of `k` values as pairs, with zeros after an odd number.
fn pairs(values: &[f32], k: usize) -> Vec<Pair> {
    let rows = values.chunks(k).map(|row| {
        let pair = |pair: &[f32]| {
            [pair[0], *pair.get(1).unwrap_or(&0.0)]
                .map(|v| bf16::from_bits((v.to_bits() >> 16) as u16))
        };
        row.chunks(2).map(pair)
    });
    rows.flatten().collect()
}

/// A matrix turned.
fn turned<T: Copy>(matrix: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|j| matrix.iter().skip(j).step_by(cols).copied()).collect()
}

/// Products of pairs, sums between others that must stay.
fn check_pairs(products: Products<Pair>, (m, k, n): (usize, usize, usize)) {
    let exact = |seed, len| Weights::all(&random(seed, len))[2].widened();
    let (x, w) = (exact(3, m * k), exact(4, n * k));
    let expected = product((&x, m, k), (&w, n), |l, j| j * k + l);
    let (x, w, len) = (pairs(&x, k), pairs(&w, k), terms::<Pair>(k));
    let of_columns = turned(&w, len);
    for nn in [false, true] {
        let mut room = vec![0.5; 16 + m * n + 16];
        let sums = &mut room[16..16 + m * n];
        if nn {
            (products.nn)(&x, &of_columns, n, sums, &w);
        } else {
            (products.nt)(&x, &w, len, sums);
        }
        for (&sum, (expected, size)) in sums.iter().zip(&expected) {
            let error = (f64::from(sum) - 0.5 - expected).abs();
            assert!(error <= 2e-6 * (size + 0.5), "nn: {nn}, {m} {k} {n}: {error:e}");
        }
        room.drain(16..16 + m * n);
        assert_eq!(room, [0.5; 32], "nothing else is written: {m} {k} {n}");
    }
}

#[test]
fn products_of_pairs_of_every_shape_are_right() {
    for products in available().iter().filter_map(|bodies| bodies.pairs) {
        for m in (1..=18).chain([27, 28, 30, 43]) {
            for n in [1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 70] {
                for k in [1, 2, 13, 31, 32, 33, 67] {
                    check_pairs(products, (m, k, n));
                }
            }
        }
        check_pairs(products, (30, 2047, 33));
        check_pairs(products, (5, 2049, 64));
    }
}

/// In either factor, at either place of a pair.
#[test]
fn a_value_that_is_not_finite_spoils_the_sums_of_its_row_alone() {
    for products in available().iter().filter_map(|bodies| bodies.pairs) {
        let (m, k, n) = (9, 37, 35);
        for (bad, place) in [(f32::NAN, 3 * k + 36), (f32::INFINITY, 3 * k + 35)] {
            for of_x in [true, false] {
                let (mut x, mut w) = (random(1, m * k), random(2, n * k));
                let spoilt = if of_x { &mut x } else { &mut w };
                spoilt[place] = bad;
                let (x, w) = (pairs(&x, k), pairs(&w, k));
                let mut sums = [vec![0.0; m * n], vec![0.0; m * n]];
                (products.nt)(&x, &w, terms::<Pair>(k), &mut sums[0]);
                let of_columns = turned(&w, terms::<Pair>(k));
                (products.nn)(&x, &of_columns, n, &mut sums[1], &[]);
                for sums in sums {
                    for (i, sum) in sums.iter().enumerate() {
                        let spoilt = if of_x { i / n == 3 } else { i % n == 3 };
                        assert_eq!(!sum.is_finite(), spoilt, "{bad} of x: {of_x}, {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_is_added_where_a_side_is_empty() {
    for bodies in available() {
        (bodies.floats.nt)(&[], &[1.0; 6], 3, &mut []);
        (bodies.floats.nn)(&[], &[1.0; 6], 3, &mut [], &[1.0]);
        let mut sums = [0.5; 4];
        (bodies.floats.nt)(&[], &[], 0, &mut sums);
        (bodies.floats.nn)(&[], &[], 2, &mut sums, &[]);
        if let Some(pairs) = bodies.pairs {
            let two = [[bf16::ONE; 2]; 6];
            (pairs.nt)(&[], &two, 3, &mut []);
            (pairs.nn)(&[], &two, 3, &mut [], &two);
            (pairs.nt)(&[], &[], 0, &mut sums);
            (pairs.nn)(&[], &[], 2, &mut sums, &two);
        }
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
