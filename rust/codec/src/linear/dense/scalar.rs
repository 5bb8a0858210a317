//! The reference body: plain Rust, any machine.

use crate::values::{with_slice, Element, Values, ValuesMut};

/// Lanes that the compiler can keep in vectors.
const LANES: usize = 8;

/// `sums += x w^T`, (m, k) by (n, k).
pub(crate) fn nt(x: &[f32], w: &[f32], k: usize, sums: &mut [f32]) {
    if k == 0 {
        return;
    }
    let n = w.len() / k;
    for (x, sums) in x.chunks_exact(k).zip(sums.chunks_exact_mut(n.max(1))) {
        for (w, sum) in w.chunks_exact(k).zip(sums) {
            *sum += dot(x, w);
        }
    }
}

/// `sums += x w`, (m, k) by (k, n).
pub(crate) fn nn(x: &[f32], w: &[f32], n: usize, sums: &mut [f32], _next: &[f32]) {
    if n == 0 || w.is_empty() {
        return;
    }
    let k = w.len() / n;
    for (x, sums) in x.chunks_exact(k).zip(sums.chunks_exact_mut(n)) {
        for (x, w) in x.iter().zip(w.chunks_exact(n)) {
            sums.iter_mut().zip(w).for_each(|(sum, w)| *sum += x * w);
        }
    }
}

fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((x, rest_x), (w, rest_w)) = (x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    for (x, w) in x.iter().zip(w) {
        for i in 0..LANES {
            lanes[i] += x[i] * w[i];
        }
    }
    let rest: f32 = rest_x.iter().zip(rest_w).map(|(x, w)| x * w).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Rounds to nearest, ties to even.
pub(crate) fn round(floats: &[f32], values: ValuesMut<'_>) {
    with_slice!(values, ValuesMut, values => Element::narrow(floats, values));
}

/// Turns 16 rows of 16 floats into columns.
pub(crate) fn transpose(square: &mut [[f32; 16]; 16]) {
    for i in 1..16 {
        let (above, row) = square.split_at_mut(i);
        for (above, value) in above.iter_mut().zip(&mut row[0]) {
            core::mem::swap(&mut above[i], value);
        }
    }
}

/// Writes the values as floats.
pub(crate) fn widen(values: Values<'_>, floats: &mut [f32]) {
    with_slice!(values, Values, v => Element::widen(v, floats));
}
