//! Products of a few tokens against sums in f64 over codes and scales.

use super::samples::{eight_bit, four_bit, random, run, run_on, without_tiles, Owned};
use super::*;
use crate::codebook::tests::NF4;
use crate::linear::{linear, Compute};
use crate::simd::available;
use crate::testing::Weights;
use crate::{Engine, ValuesMut};

#[test]
fn every_body_sums_the_products_of_codes_scales_and_values() {
    for w in four_bit().chain(eight_bit()) {
        for tokens in 1..=MAX_TOKENS {
            let x = random(w.cols as u64, tokens * w.cols);
            for bodies in available() {
                let y = run(bodies, &w, &x, Compute::Exact);
                let (name, error) = (bodies.name(), w.error(&x, &y));
                let shape = [w.rows, w.cols, w.blocksize];
                assert!(error < 1e-6, "{name} {shape:?} M={tokens}: {error:e}");
            }
        }
    }
}

#[test]
fn an_odd_code_is_in_the_low_nibble() {
    let mut w = Owned::new(0, [1, 64, 64], Some(NF4));
    w.codes.fill(0x7f); // 0 and 1
    w.absmax.fill(2.0);
    let mut x = vec![0.0; 64];
    for k in 0..64 {
        x.fill(0.0);
        x[k] = 3.0;
        for bodies in available() {
            let expected = if k % 2 == 0 { 0.0 } else { 6.0 };
            assert_eq!(run(bodies, &w, &x, Compute::Exact), [expected], "{} at {k}", bodies.name());
        }
    }
}

#[test]
fn a_token_gives_the_same_bytes_alone_and_among_others() {
    for w in four_bit().chain(eight_bit()) {
        let x = random(7, MAX_TOKENS * w.cols);
        for bodies in without_tiles() {
            for compute in [Compute::Exact, Compute::Int8] {
                let alone: Vec<f32> =
                    x.chunks(w.cols).flat_map(|x| run(bodies, &w, x, compute)).collect();
                let panels = compute == Compute::Int8 && bodies.int8.is_some();
                for tokens in 2..=if panels { int8::FEW } else { MAX_TOKENS } {
                    let y = run(bodies, &w, &x[..tokens * w.cols], compute);
                    assert_eq!(y, alone[..tokens * w.rows], "{} M={tokens}", bodies.name());
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let w = Owned::new(1, [2050, 1088, 64], Some(NF4));
    let x = random(2, 2 * w.cols);
    for bodies in available() {
        for compute in [Compute::Exact, Compute::Int8] {
            let one = run(bodies, &w, &x, compute);
            for threads in [2, 0, 7] {
                let y = run_on(Engine::new(bodies, threads), &w, &x, compute);
                assert_eq!(y, one, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn x_of_16_bits_is_widened_and_the_sums_are_rounded_once() {
    let w = Owned::new(1, [70, 192, 64], Some(NF4));
    for x in Weights::all(&random(3, w.cols)) {
        let pairs =
            |bodies: &&&Bodies| matches!(x, Weights::Bf16(_)) && bodies.matvec_pairs.is_some();
        // Products of bfloat16 round the weight, too: they have a test of their own.
        for bodies in available().iter().filter(|bodies| !pairs(bodies)) {
            let sums = run(bodies, &w, &x.widened(), Compute::Exact);
            let [y32, y16, y_bf16] = Weights::all(&sums);
            let mut y = match &x {
                Weights::F32(_) => y32.clone(),
                Weights::F16(_) => y16.clone(),
                Weights::Bf16(_) => y_bf16.clone(),
            };
            let expected = y.bits();
            let engine = Engine::new(bodies, 1);
            linear(engine, x.values(), &w.weight(), None, None, Compute::Exact, y.values_mut())
                .unwrap();
            assert_eq!(y.bits(), expected, "{}", bodies.name());
        }
    }
}

#[test]
fn products_of_bfloat16_are_those_of_the_dequantized_weight() {
    let shapes = [[70, 192, 64], [1, 64, 64], [5, 4096, 256], [64, 320, 64], [67, 8192, 4096]];
    for (seed, shape) in shapes.into_iter().enumerate() {
        for nested in [false, true] {
            let w = Owned::new(seed as u64, shape, Some(NF4));
            let w = if nested { w.nested(seed as u64) } else { w };
            let mut dense = vec![bf16::ZERO; w.rows * w.cols];
            let values = ValuesMut::Bf16(&mut dense);
            w.weight().dequantize_rows(available()[0], 0..w.rows, values);
            for tokens in 1..=MOST_TOKENS {
                let x: Vec<bf16> =
                    random(9, tokens * w.cols).into_iter().map(bf16::from_f32).collect();
                for bodies in available().iter().filter(|bodies| bodies.matvec_pairs.is_some()) {
                    for threads in [1, 2] {
                        let mut y = vec![f32::NAN; tokens * w.rows];
                        let (engine, out) = (Engine::new(bodies, threads), ValuesMut::F32(&mut y));
                        let (x, weight) = (Values::Bf16(&x), w.weight());
                        linear(engine, x, &weight, None, None, Compute::Exact, out).unwrap();
                        let error = worst(&x, &dense, &y, w.cols);
                        assert!(error < 1e-6, "{} {shape:?} M={tokens}: {error:e}", bodies.name());
                    }
                }
            }
        }
    }
}

/// Largest error against sums in f64, in units of the sums of magnitudes.
fn worst(x: &Values<'_>, w: &[bf16], y: &[f32], cols: usize) -> f64 {
    let Values::Bf16(x) = x else { unreachable!("x is bfloat16") };
    let rows = w.len() / cols;
    let products = x.chunks(cols).zip(y.chunks(rows)).flat_map(|(x, y)| {
        w.chunks(cols).zip(y).map(move |(w, y)| {
            let terms = x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64());
            let (sum, size) = terms.fold((0.0, 1e-30), |(s, m), t| (s + t, m + t.abs()));
            (f64::from(*y) - sum).abs() / size
        })
    });
    products.fold(0.0, f64::max)
}

#[test]
fn a_scale_that_is_not_finite_spoils_its_row_alone() {
    for table in [Some(NF4), None] {
        for (row, block) in [(0, 0), (3, 2), (6, 2), (4, 1)] {
            for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut w = Owned::new(5, [7, 192, 64], table);
                w.absmax[row * 3 + block] = scale;
                let x = random(6, 2 * w.cols);
                for bodies in available() {
                    for compute in [Compute::Exact, Compute::Int8] {
                        for y in run(bodies, &w, &x, compute).chunks(w.rows) {
                            let spoilt: Vec<_> = (0..7).filter(|&i| !y[i].is_finite()).collect();
                            assert_eq!(spoilt, [row], "{} {compute:?} {scale}", bodies.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_token_alone() {
    for table in [Some(NF4), None] {
        let w = Owned::new(5, [7, 192, 64], table);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = random(6, 3 * w.cols);
            x[w.cols + 70] = bad;
            for bodies in available() {
                for compute in [Compute::Exact, Compute::Int8] {
                    let y = run(bodies, &w, &x, compute);
                    for (token, y) in y.chunks(w.rows).enumerate() {
                        let finite = y.iter().all(|y| y.is_finite());
                        assert_eq!(finite, token != 1, "{} {compute:?}", bodies.name());
                    }
                }
            }
        }
    }
}

#[test]
fn scales_and_values_near_the_ends_of_the_range_do_not_overflow_or_vanish() {
    for table in [Some(NF4), None] {
        for (scale, size) in [(3e37, 0.1), (1e-30, 1e30), (1e30, 1e-30), (1e-37, 1.0)] {
            let mut w = Owned::new(5, [5, 192, 64], table);
            w.absmax.iter_mut().for_each(|a| *a *= 10.0 * scale);
            let mut x = random(6, w.cols);
            x = x.into_iter().map(|x| x * size).collect();
            for bodies in available() {
                let name = bodies.name();
                let error = w.error(&x, &run(bodies, &w, &x, Compute::Exact));
                assert!(error < 1e-6, "{name} {scale:e}: {error:e}");
                let error = w.error(&x, &run(bodies, &w, &x, Compute::Int8));
                assert!(error < 1e-2, "{name} int8 {scale:e}: {error:e}");
            }
        }
    }
}
