//! The reference body: plain Rust, any machine.

use std::borrow::Cow;
use std::ops::Range;

use crate::dequantize_int8::step;
use crate::linear::matvec::{int8, Matvec};
use crate::linear::weight::{Codes, Weight};

pub(crate) static MATVEC: Matvec =
    Matvec { arrange: |x, _| Cow::Borrowed(x), exact, int8: int8::scalar::multiply };

/// Writes the sums of some rows.
fn exact(weight: &Weight<'_>, rows: Range<usize>, x: &[f32], sums: &mut [f32]) {
    let (cols, blocksize) = (weight.cols, weight.blocksize);
    let mut scales = vec![0.0; cols / blocksize];
    let mut values = vec![0.0; cols];
    let count = rows.len();
    for (i, row) in rows.enumerate() {
        weight.scales.write(row * scales.len(), &mut scales);
        match weight.codes {
            Codes::FourBit { packed, table } => {
                let packed = &packed[row * cols / 2..(row + 1) * cols / 2];
                for (pair, byte) in values.chunks_exact_mut(2).zip(packed) {
                    pair[0] = table[usize::from(byte >> 4)];
                    pair[1] = table[usize::from(byte & 15)];
                }
            }
            Codes::Int8(codes) => {
                let codes = &codes[row * cols..(row + 1) * cols];
                values.iter_mut().zip(codes).for_each(|(value, &code)| *value = f32::from(code));
                scales = scales.into_iter().map(step).collect();
            }
        }
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let blocks = x.chunks_exact(blocksize).zip(values.chunks_exact(blocksize));
            sums[token * count + i] =
                blocks.zip(&scales).map(|((x, values), scale)| dot(x, values) * scale).sum();
        }
    }
}

/// In eight sums, which the compiler can keep in vectors.
fn dot(x: &[f32], values: &[f32]) -> f32 {
    let mut lanes = [0.0; 8];
    for (x, values) in x.chunks(8).zip(values.chunks(8)) {
        for ((lane, x), value) in lanes.iter_mut().zip(x).zip(values) {
            *lane += x * value;
        }
    }
    lanes.iter().sum()
}
