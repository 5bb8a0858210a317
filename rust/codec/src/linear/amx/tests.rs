//! Products on tiles against sums in f64.

use std::sync::Mutex;

use half::bf16;

use super::*;
use crate::linear::tests::Owned;
use crate::testing::{Random, Weights};
use crate::{available, Engine};

/// `dY W` for bfloat16, and what its errors are measured by.
fn oracle(grad: &[bf16], w: &Owned) -> Vec<(f64, f64)> {
    let dense = w.dense(&Weights::Bf16(Vec::new()));
    let rows = grad.chunks(w.rows).map(|grad| {
        (0..w.cols).map(|k| {
            let terms = grad.iter().enumerate().map(|(n, g)| g.to_f64() * dense[n * w.cols + k]);
            terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()))
        })
    });
    rows.flatten().collect()
}

#[test]
fn backward_multiplies_by_the_weight_itself() {
    if !granted() {
        return; // no such machine: nothing to check
    }
    let shapes = [(1, 64, 64), (33, 128, 64), (64, 320, 64), (520, 192, 64), (70, 1024, 256)];
    for (i, (rows, cols, blocksize)) in shapes.into_iter().enumerate() {
        let w = Owned::new(i as u64, rows, cols, blocksize);
        assert!(fits(&w.weight()));
        for tokens in [1, 2, 16, 17, 33, 64] {
            let mut random = Random(7);
            let grad: Vec<bf16> =
                (0..tokens * rows).map(|_| bf16::from_f32(random.unit())).collect();
            let expected = oracle(&grad, &w);
            for threads in [1, 2] {
                let mut dx = vec![bf16::NAN; tokens * cols];
                let found = Mutex::new(vec![f32::NAN; tokens * cols]);
                let keep = |strip: crate::linear::strips::Strip<'_, bf16>, sums: &mut [f32]| {
                    let (columns, mut found) = (strip.columns, found.lock().unwrap());
                    for (row, sums) in found.chunks_mut(cols).zip(sums.chunks(columns.len())) {
                        row[columns.clone()].copy_from_slice(sums);
                    }
                };
                let engine = Engine::new(available()[0], threads);
                // SAFETY: granted.
                unsafe { backward(engine, &grad, &w.weight(), &keep, &mut dx) }.unwrap();
                let found = found.into_inner().unwrap();
                for (i, (found, (sum, size))) in found.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*found) - sum).abs();
                    assert!(error <= 1e-6 * size, "{rows}x{cols} M={tokens} at {i}: {error:e}");
                }
            }
        }
    }
}
