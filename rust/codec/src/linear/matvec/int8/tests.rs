//! Products in integers: every body's are the same, and as good as the documentation says.

use super::*;
use crate::codebook::tests::NF4;
use crate::linear::matvec::samples::{eight_bit, four_bit, gaussian, run, without_tiles, Owned};
use crate::linear::Compute;
use crate::simd::available;
use crate::testing::tables;

/// Sums in integers are exact: bodies differ by the rounding of sums of blocks.
#[test]
fn every_body_computes_the_same_integers() {
    for w in four_bit().chain(eight_bit()) {
        let x = gaussian(w.cols as u64, 2 * w.cols);
        let scalar = run(available()[available().len() - 1], &w, &x, Compute::Int8);
        let mut outputs: Vec<_> = without_tiles()
            .map(|bodies| (bodies.name(), run(bodies, &w, &x, Compute::Int8)))
            .collect();
        outputs.extend(without_dot_products(&w, &x));
        for (name, y) in outputs {
            for (i, (y, expected)) in y.iter().zip(&scalar).enumerate() {
                let row = i % w.rows;
                let x = &x[i / w.rows * w.cols..][..w.cols];
                let terms = x.iter().enumerate().map(|(k, &x)| w.value(row, k) * f64::from(x));
                let size: f64 = terms.map(f64::abs).sum();
                let difference = f64::from(y - expected).abs() / size;
                let shape = [w.rows, w.cols, w.blocksize];
                assert!(difference < 1e-6, "{name} {shape:?}: {y} is not {expected}");
            }
        }
    }
}

/// What machines without VNNI compute, on one that may have it; on ARM without `sdot`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[allow(unsafe_code)]
fn without_dot_products(w: &Owned, x: &[f32]) -> Option<(&'static str, Vec<f32>)> {
    let name = if cfg!(target_arch = "x86_64") { "avx2" } else { "neon" };
    let bodies = available().iter().find(|bodies| bodies.name() == name)?;
    let weight = w.weight();
    if !serves(&weight) {
        return None;
    }
    let mut y = vec![f32::NAN; x.len() / w.cols * w.rows];
    let x = Rounded::new(bodies, x, &weight);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: this machine can run the AVX2 bodies.
    unsafe {
        avx2::multiply(&weight, 0..w.rows, &x, &mut y);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: this machine can run the NEON bodies.
    unsafe {
        neon::multiply(&weight, 0..w.rows, &x, &mut y);
    }
    Some(("without dot products", y))
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn without_dot_products(_: &Owned, _: &[f32]) -> Option<(&'static str, Vec<f32>)> {
    None
}

/// The error that the documentation of [`Compute::Int8`] states.
#[test]
fn rounding_x_to_8_bits_costs_what_the_documentation_says() {
    for (table, bound) in [(Some(NF4), 0.0065), (None, 0.0065)] {
        let mut w = Owned::new(9, [200, 4096, 64], table);
        w.absmax.iter_mut().for_each(|a| *a = a.abs() + 0.05);
        let x = gaussian(10, w.cols);
        for bodies in available() {
            let y = run(bodies, &w, &x, Compute::Int8);
            let (mut squares, mut errors) = (0.0, 0.0);
            for (row, y) in y.iter().enumerate() {
                let terms = x.iter().enumerate().map(|(k, &x)| w.value(row, k) * f64::from(x));
                let sum: f64 = terms.sum();
                squares += sum * sum;
                errors += (f64::from(*y) - sum) * (f64::from(*y) - sum);
            }
            let error = f64::sqrt(errors / squares);
            assert!(error > 0.003, "{}: {error:e} is too good to be of 8 bits", bodies.name());
            assert!(error < bound, "{}: {error:e}", bodies.name());
        }
    }
}

#[test]
fn a_table_becomes_integers_of_14_bits() {
    for table in tables() {
        let ([high, low], unit) = integers(&table);
        for i in 0..16 {
            let integer = 128 * (i32::from(high[i]) - 64) + i32::from(low[i]);
            assert!(high[i] < 128 && low[i] < 128, "pairs of products fit 16 bits");
            assert!((integer as f32 * unit - table[i]).abs() <= 0.501 * unit, "{}", table[i]);
        }
    }
    let ([high, low], unit) = integers(&[0.0; 16]);
    assert_eq!((high, low, unit), ([64; 16], [0; 16], 0.0));
}
