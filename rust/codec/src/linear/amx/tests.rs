//! Products on tiles against sums in f64.

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
        assert!(w.weight().chunks_have_scales());
        for tokens in [1, 2, 16, 17, 33, 64] {
            let mut random = Random(7);
            let grad: Vec<bf16> =
                (0..tokens * rows).map(|_| bf16::from_f32(random.unit())).collect();
            let expected = oracle(&grad, &w);
            for threads in [1, 2] {
                let mut dx = vec![f32::NAN; tokens * cols];
                let engine = Engine::new(available()[0], threads);
                // SAFETY: granted.
                unsafe { backward(engine, &grad, &w.weight(), None, &mut dx) }.unwrap();
                for (i, (found, (sum, size))) in dx.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*found) - sum).abs();
                    assert!(error <= 1e-6 * size, "{rows}x{cols} M={tokens} at {i}: {error:e}");
                }
            }
        }
    }
}
