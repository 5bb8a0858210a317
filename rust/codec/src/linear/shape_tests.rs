//! Layers of every shape against sums in f64: rows that share blocks, odd sizes, empty sides.

use super::matvec::samples::{random, run_on, Owned};
use super::*;
use crate::codebook::tests::NF4;
use crate::simd::available;
use crate::testing::Weights;
use crate::{Bodies, Engine, Scales, Values};

/// Room like `values`.
fn room(values: &Weights, len: usize) -> Weights {
    let [f32s, f16s, bf16s] = Weights::room(len);
    match values {
        Weights::F32(_) => f32s,
        Weights::F16(_) => f16s,
        Weights::Bf16(_) => bf16s,
    }
}

/// What rounding to the dtype may cost.
fn tolerance(values: &Weights) -> f64 {
    match values {
        Weights::F32(_) => 1e-6,
        Weights::F16(_) => 1e-3,
        Weights::Bf16(_) => 8e-3,
    }
}

/// Compares with sums of terms.
fn check(found: &[f32], tolerance: f64, terms: impl Fn(usize, &mut dyn FnMut(f64)), what: &str) {
    for (i, &found) in found.iter().enumerate() {
        let (mut sum, mut size) = (0.0, 1e-30);
        terms(i, &mut |term| {
            sum += term;
            size += f64::abs(term);
        });
        let error = (f64::from(found) - sum).abs() / size;
        assert!(error <= tolerance, "{what}, {i}: {found} for {sum}, {error:e}");
    }
}

fn forward(engine: Engine, x: &Weights, w: &Owned, compute: Compute) -> Weights {
    let mut y = room(x, x.widened().len() / w.cols * w.rows);
    linear(engine, x.values(), &w.weight(), None, None, compute, y.values_mut()).unwrap();
    y
}

fn backward(engine: Engine, grad: &Weights, w: &Owned) -> Weights {
    let mut dx = room(grad, grad.widened().len() / w.rows * w.cols);
    linear_backward(engine, grad.values(), &w.weight(), None, dx.values_mut()).unwrap();
    dx
}

/// Forward and backward of every body and dtype.
fn check_layer(w: &Owned, tokens: usize) {
    let shape = [w.rows, w.cols, w.blocksize];
    let all_x = Weights::all(&random(1, tokens * w.cols));
    for (x, grad) in all_x.iter().zip(Weights::all(&random(2, tokens * w.rows))) {
        let (xs, dys) = (x.widened(), grad.widened());
        for bodies in available() {
            let what = format!("{} {shape:?} M={tokens}", bodies.name());
            let engine = Engine::new(bodies, 1);
            let y = forward(engine, x, w, Compute::Exact).widened();
            let terms = |i: usize, add: &mut dyn FnMut(f64)| {
                let (token, row) = (i / w.rows, i % w.rows);
                (0..w.cols).for_each(|k| add(w.value(row, k) * f64::from(xs[token * w.cols + k])));
            };
            check(&y, tolerance(x), terms, &format!("y, {what}"));
            let dx = backward(engine, &grad, w).widened();
            let terms = |i: usize, add: &mut dyn FnMut(f64)| {
                let (token, col) = (i / w.cols, i % w.cols);
                (0..w.rows).for_each(|n| add(w.value(n, col) * f64::from(dys[token * w.rows + n])));
            };
            check(&dx, tolerance(&grad), terms, &format!("dX, {what}"));
        }
    }
}

/// A weight of 4-bit codes whose values may end within a block.
fn four_bit(seed: u64, [rows, cols, blocksize]: [usize; 3]) -> Owned {
    let len = (rows * cols).next_multiple_of(blocksize);
    let w = Owned::new(seed, [1, len, blocksize], Some(NF4));
    let mut w = Owned { rows, cols, ..w };
    w.codes.truncate((rows * cols).div_ceil(2));
    w
}

#[test]
fn layers_of_every_shape_are_right() {
    let shapes = [
        [1, 64, 64],
        [3, 192, 64], // columns that are no multiple of 128
        [65, 128, 128],
        [257, 64, 64],  // an odd row in a panel of its own
        [113, 320, 64], // a strip of one row
        [2, 8192, 4096],
        [5, 4096, 2048],
        [3, 1536, 512],
        [67, 1088, 64], // a second piece of columns
        [5, 31, 32],    // odd columns
        [33, 101, 64],
        [9, 1025, 64],
        [130, 65, 128],
        [1, 33, 4096],
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        let w = four_bit(i as u64, shape);
        let w = if i % 2 == 1 { w.nested(i as u64) } else { w };
        for tokens in [1, 2, 3, 9, 24, 25, 35] {
            check_layer(&w, tokens);
        }
    }
    for shape in [[3, 33, 33], [7, 1111, 1111], [130, 65, 65], [6, 300, 100], [3, 630, 7]] {
        for tokens in [1, 3, 9, 25] {
            check_layer(&Owned::new(3, shape, None), tokens);
        }
    }
}

/// Root of the mean square of the error over that of the product.
fn relative_error(w: &Owned, x: &[f32], y: &[f32]) -> f64 {
    let (mut wrong, mut size) = (0.0, 0.0);
    for (x, y) in x.chunks(w.cols).zip(y.chunks(w.rows)) {
        for (row, y) in y.iter().enumerate() {
            let terms = x.iter().enumerate().map(|(k, &x)| w.value(row, k) * f64::from(x));
            let sum = terms.sum::<f64>();
            wrong += (f64::from(*y) - sum).powi(2);
            size += sum * sum;
        }
    }
    (wrong / size).sqrt()
}

#[test]
fn eight_bit_products_of_every_shape_and_of_many_tokens_are_right() {
    let four_bits = [
        [1, 64, 64],
        [29, 192, 64],
        [115, 1088, 64],
        [3, 8192, 4096],
        [113, 33, 64],
        [9, 1025, 64],
        [130, 65, 128],
    ];
    let four_bits = four_bits.into_iter().enumerate().map(|(i, s)| four_bit(i as u64, s));
    let eight_bits = [[3, 33, 33], [7, 1111, 1111], [130, 65, 65], [6, 300, 100], [3, 630, 7]];
    let eight_bits = eight_bits.map(|shape| Owned::new(3, shape, None));
    for w in four_bits.chain(eight_bits) {
        for tokens in [1, 2, 3, 8, 9, 24, 25, 513, 520, 530] {
            if tokens > 500 && w.rows * w.cols > 20_000 {
                continue; // the tests shall stay fast
            }
            let x = random(4, tokens * w.cols);
            let shape = [w.rows, w.cols, w.blocksize];
            for bodies in available() {
                let y = run_on(Engine::new(bodies, 1), &w, &x, Compute::Int8);
                let error = relative_error(&w, &x, &y);
                assert!(error < 0.02, "{} {shape:?} M={tokens}: {error}", bodies.name());
                let more = run_on(Engine::new(bodies, 2), &w, &x, Compute::Int8);
                assert_eq!(y, more, "{} {shape:?} M={tokens}, two threads", bodies.name());
            }
        }
    }
}

#[test]
fn a_token_that_is_not_finite_spoils_no_other_of_many() {
    let weights = [
        four_bit(5, [35, 192, 64]),
        four_bit(6, [35, 101, 64]),
        Owned::new(7, [35, 101, 101], None),
    ];
    for w in &weights {
        for (tokens, token) in [(3, 1), (7, 2), (20, 7), (25, 24), (41, 16)] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = random(6, tokens * w.cols);
                values[token * w.cols + w.cols - 1] = bad;
                for x in Weights::all(&values) {
                    for bodies in available() {
                        for compute in [Compute::Exact, Compute::Int8] {
                            let y = forward(Engine::new(bodies, 1), &x, w, compute).widened();
                            for (i, y) in y.chunks(w.rows).enumerate() {
                                let finite = y.iter().all(|y| y.is_finite());
                                let name = bodies.name();
                                assert_eq!(finite, i != token, "{name} {compute:?} {bad} {i}");
                                for (row, y) in y.iter().enumerate().filter(|y| y.1.is_infinite()) {
                                    let sign = f64::from(bad) * w.value(row, w.cols - 1);
                                    assert_eq!(f64::from(*y), sign, "{name} {compute:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn up_to_four_tokens_of_any_dtype_give_the_same_bytes_alone_and_among_others() {
    for shape in [[35, 192, 64], [67, 1088, 64], [2, 8192, 4096]] {
        let w = four_bit(8, shape);
        for values in Weights::all(&random(9, 4 * w.cols)) {
            for bodies in available().iter().filter(|bodies| bodies.tiles.is_none()) {
                let run = |x: Values<'_>, tokens| {
                    let mut y = room(&values, tokens * w.rows);
                    let (engine, y_mut) = (Engine::new(bodies, 1), y.values_mut());
                    linear(engine, x, &w.weight(), None, None, Compute::Exact, y_mut).unwrap();
                    y.bits()
                };
                let x = values.values();
                let alone: Vec<u32> =
                    (0..4).flat_map(|i| run(x.range(i * w.cols..(i + 1) * w.cols), 1)).collect();
                for tokens in 2..=4 {
                    let y = run(x.range(0..tokens * w.cols), tokens);
                    assert_eq!(y, alone[..y.len()], "{} {shape:?} M={tokens}", bodies.name());
                }
            }
        }
    }
}

/// As those of a few tokens do not.
#[test]
fn many_tokens_near_the_ends_of_the_range_do_not_overflow_or_vanish() {
    for table in [Some(NF4), None] {
        for (scale, size) in
            [(3e37, 0.1), (1e-30, 1e30), (1e30, 1e-30), (3e-37, 1e10), (1e10, 3e-37)]
        {
            let mut w = Owned::new(5, [5, 192, 64], table);
            w.absmax.iter_mut().for_each(|a| *a *= 10.0 * scale);
            let x: Vec<f32> = random(6, 12 * w.cols).into_iter().map(|x| x * size).collect();
            for bodies in available() {
                for (compute, bound) in [(Compute::Exact, 1e-6), (Compute::Int8, 1e-2)] {
                    // On tiles the products of huge weights are infinite before x makes them small.
                    if bodies.tiles.is_some() && compute == Compute::Int8 && scale > 1e36 {
                        continue;
                    }
                    let y = run_on(Engine::new(bodies, 1), &w, &x, compute);
                    let error = w.error(&x, &y);
                    let name = bodies.name();
                    assert!(error < bound, "{name} {compute:?} {scale:e} {size:e}: {error:e}");
                }
            }
        }
    }
}

fn layer_of_nothing(bodies: &'static Bodies, [rows, cols, tokens]: [usize; 3], rank: usize) {
    let packed = vec![0x21; (rows * cols).div_ceil(2)];
    let absmax = vec![1.0; (rows * cols).div_ceil(64)];
    let weight = Weight {
        codes: Codes::FourBit { packed: &packed, table: &NF4 },
        scales: Scales::Plain(&absmax),
        blocksize: 64,
        rows,
        cols,
    };
    let (a, b) = (vec![1.0; rank * cols], vec![1.0; rows * rank]);
    let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 1.0 };
    let engine = Engine::new(bodies, 1);
    let inputs = Weights::all(&vec![0.0; tokens * cols]);
    for (x, grad) in inputs.iter().zip(Weights::all(&vec![0.0; tokens * rows])) {
        for compute in [Compute::Exact, Compute::Int8] {
            let mut y = room(x, tokens * rows);
            linear(engine, x.values(), &weight, None, Some(lora), compute, y.values_mut()).unwrap();
            assert_eq!(y.widened(), vec![0.0; tokens * rows], "{}", bodies.name());
        }
        let mut dx = room(x, tokens * cols);
        linear_backward(engine, grad.values(), &weight, Some(lora), dx.values_mut()).unwrap();
        assert_eq!(dx.widened(), vec![0.0; tokens * cols], "{}", bodies.name());
        if cols == 0 && tokens > 0 {
            continue; // x does not say how many tokens there are
        }
        let (mut da, mut db) = (vec![f32::NAN; a.len()], vec![f32::NAN; b.len()]);
        lora_gradients(engine, x.values(), grad.values(), lora, Some(&mut da), Some(&mut db))
            .unwrap();
        assert_eq!((da, db), (vec![0.0; a.len()], vec![0.0; b.len()]), "{}", bodies.name());
    }
}

#[test]
fn layers_with_an_empty_side_give_zeros() {
    for bodies in available() {
        for shape in [[0, 64, 5], [64, 0, 5], [64, 64, 0], [0, 0, 5], [0, 64, 0], [3, 64, 12]] {
            for rank in [0, 1, 3, 16] {
                layer_of_nothing(bodies, shape, rank);
            }
        }
    }
}
