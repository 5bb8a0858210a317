//! Gradients of a linear layer against sums in f64.

use super::tests::{random, Owned};
use super::*;
use crate::testing::Weights;
use crate::{available, Bodies, Engine, Values, ValuesMut};

/// The values in f64.
fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// `x w`, (m, k) by (k, n), and the sums of magnitudes.
fn product(x: &[f64], w: &[f64], k: usize, n: usize) -> Vec<(f64, f64)> {
    let mut sums = Vec::new();
    for x in x.chunks(k) {
        sums.extend((0..n).map(|j| {
            x.iter().enumerate().fold((0.0, 0.0), |(sum, size), (l, x)| {
                let term = x * w[l * n + j];
                (sum + term, size + term.abs())
            })
        }));
    }
    sums
}

fn turned(x: &[f64], cols: usize) -> Vec<f64> {
    (0..cols).flat_map(|j| x.iter().skip(j).step_by(cols).copied()).collect()
}

fn firsts(sums: &[(f64, f64)], scaling: f64) -> Vec<f64> {
    sums.iter().map(|(sum, _)| sum * scaling).collect()
}

fn check(found: &[f32], expected: &[(f64, f64)], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (&found, (sum, size))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - sum).abs() / size.max(1e-30);
        assert!(error <= tolerance, "{what}, {i}: {found} for {sum}, {error:e}");
    }
}

fn backward(
    bodies: &'static Bodies,
    threads: usize,
    grad: &Weights,
    w: &Owned,
    lora: Option<Lora<'_>>,
) -> Weights {
    let len = grad.widened().len() / w.rows * w.cols;
    let [f32s, f16s, bf16s] = Weights::room(len);
    let mut dx = match grad {
        Weights::F32(_) => f32s,
        Weights::F16(_) => f16s,
        Weights::Bf16(_) => bf16s,
    };
    let engine = Engine::new(bodies, threads);
    linear_backward(engine, grad.values(), &w.weight(), lora, dx.values_mut()).unwrap();
    dx
}

#[test]
fn dx_of_every_body_is_right() {
    let shapes = [
        (64, 128, 64),
        (250, 192, 64),
        (16, 1024, 1024),
        (33, 100, 64),
        (7, 33, 64),
        (1, 1, 64),
        (300, 64, 32),
    ];
    for (i, (rows, cols, blocksize)) in shapes.into_iter().enumerate() {
        let w = Owned::new(i as u64, rows, cols, blocksize);
        for tokens in [1, 2, 5, 14, 33, 515] {
            for grad in Weights::all(&random(50 + i as u64, tokens * rows)) {
                let tolerance = match grad {
                    Weights::F32(_) => 1e-6,
                    Weights::F16(_) => 1e-3,
                    Weights::Bf16(_) => 8e-3,
                };
                if tokens > 500 && rows * cols > 10_000 {
                    continue; // the tests shall stay fast
                }
                let expected = product(&f64s(&grad.widened()), &w.dense(&grad), rows, cols);
                for bodies in available() {
                    let dx = backward(bodies, 1, &grad, &w, None);
                    let what = format!("{} {rows}x{cols} M={tokens}", bodies.name());
                    check(&dx.widened(), &expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn dx_of_an_adapter_is_added_before_the_rounding() {
    let (rows, cols, tokens, rank) = (70, 192, 20, 5);
    let w = Owned::new(1, rows, cols, 64);
    let (a, b) = (random(3, rank * cols), random(4, rows * rank));
    let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 0.5 };
    let grad = Weights::F32(random(5, tokens * rows));
    let dy = f64s(&grad.widened());
    let g = firsts(&product(&dy, &f64s(&b), rows, rank), 0.5);
    let mut expected = product(&dy, &w.dense(&grad), rows, cols);
    for (sum, more) in expected.iter_mut().zip(product(&g, &f64s(&a), rank, cols)) {
        *sum = (sum.0 + more.0, sum.1 + 10.0 * more.1);
    }
    for bodies in available() {
        let dx = backward(bodies, 1, &grad, &w, Some(lora));
        check(&dx.widened(), &expected, 1e-6, bodies.name());
    }
}

/// dA and dB.
fn gradients(engine: Engine, x: &Weights, grad: &Weights, lora: Lora<'_>) -> [Vec<f32>; 2] {
    let (mut da, mut db) = (vec![f32::NAN; lora.a.len()], vec![f32::NAN; lora.b.len()]);
    let (x, grad) = (x.values(), grad.values());
    lora_gradients(engine, x, grad, lora, Some(&mut da), Some(&mut db)).unwrap();
    [da, db]
}

#[test]
fn gradients_of_an_adapter_of_any_rank_are_right() {
    let cases = [
        (1, 8, 5, 3),
        (16, 300, 260, 130),
        (3, 64, 100, 29),
        (256, 70, 40, 30),
        (17, 500, 33, 113),
    ];
    for (rank, rows, cols, tokens) in cases {
        let (a, b) = (random(1, rank * cols), random(2, rows * rank));
        let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 2.0 };
        let xs = Weights::all(&random(3, tokens * cols));
        let grads = Weights::all(&random(4, tokens * rows));
        for (x, grad) in xs.iter().zip(&grads) {
            let (xs, dys) = (f64s(&x.widened()), f64s(&grad.widened()));
            let h = firsts(&product(&xs, &turned(&f64s(&a), cols), cols, rank), 2.0);
            let g = firsts(&product(&dys, &f64s(&b), rows, rank), 2.0);
            let da = product(&turned(&g, rank), &xs, tokens, cols);
            let db = product(&turned(&dys, rows), &h, tokens, rank);
            for bodies in available() {
                let [found_a, found_b] = gradients(Engine::new(bodies, 1), x, grad, lora);
                check(&found_a, &da, 1e-5, &format!("dA {rank}, {}", bodies.name()));
                check(&found_b, &db, 1e-5, &format!("dB {rank}, {}", bodies.name()));
            }
        }
    }
}

#[test]
fn one_gradient_alone_is_the_same() {
    let (rank, rows, cols, tokens) = (4, 30, 40, 12);
    let (a, b) = (random(1, rank * cols), random(2, rows * rank));
    let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 1.0 };
    let (x, grad) =
        (Weights::F32(random(3, tokens * cols)), Weights::F32(random(4, tokens * rows)));
    let engine = Engine::new(available()[0], 1);
    let both = gradients(engine, &x, &grad, lora);
    let (mut da, mut db) = (vec![0.0; a.len()], vec![0.0; b.len()]);
    lora_gradients(engine, x.values(), grad.values(), lora, Some(&mut da), None).unwrap();
    lora_gradients(engine, x.values(), grad.values(), lora, None, Some(&mut db)).unwrap();
    assert_eq!([da, db], both);
}

#[test]
fn gradients_are_the_same_bytes_for_any_number_of_threads() {
    let (rank, tokens) = (16, 40);
    let w = Owned::new(5, 1000, 1024, 64);
    let (a, b) = (random(1, rank * w.cols), random(2, w.rows * rank));
    let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 1.0 };
    let xs = Weights::all(&random(3, tokens * w.cols));
    for (x, grad) in xs.iter().zip(Weights::all(&random(4, tokens * w.rows))) {
        for bodies in available() {
            let run = |threads| {
                let dx = backward(bodies, threads, &grad, &w, Some(lora)).bits();
                (dx, gradients(Engine::new(bodies, threads), x, &grad, lora))
            };
            let one = run(1);
            for threads in [2, 0, 7] {
                assert!(run(threads) == one, "{}, {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let w = Owned::new(1, 6, 64, 64);
    let engine = Engine::new(available()[0], 1);
    let (grad, mut dx) = (vec![0.0; 13], vec![0.0; 2 * 64]);
    let grad = Values::F32(&grad);
    let error = linear_backward(engine, grad, &w.weight(), None, ValuesMut::F32(&mut dx));
    let text = "grad has length 13, but 2 tokens need 12";
    assert_eq!(error.unwrap_err().to_string(), text);
    let lora =
        Lora { a: Values::F32(&[0.0; 64]), b: Values::F32(&[0.0; 6]), rank: 1, scaling: 1.0 };
    let (x, mut da) = ([0.0; 128], [0.0; 63]);
    let dy = Values::F32(&dx[..12]);
    let error = lora_gradients(engine, Values::F32(&x), dy, lora, Some(&mut da), None);
    let text = "grad_A has length 63, but 64 features need 64";
    assert_eq!(error.unwrap_err().to_string(), text);
}
