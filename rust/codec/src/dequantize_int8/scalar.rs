//! The reference body: plain Rust, any machine.

use crate::dequantize_int8::step;
use crate::values::{with_slice, Element, Stores, ValuesMut};

/// Values that are computed and rounded together.
const STRIP: usize = 32;

/// Dequantizes whole blocks.
pub(crate) fn dequantize(
    codes: &[i8],
    absmax: &[f32],
    blocksize: usize,
    _stores: Stores,
    values: ValuesMut<'_>,
) {
    with_slice!(values, ValuesMut, v => {
        let inputs = codes.chunks_exact(blocksize).zip(absmax);
        for (block, (codes, &absmax)) in v.chunks_exact_mut(blocksize).zip(inputs) {
            dequantize_block(codes, absmax, block);
        }
    });
}

/// Dequantizes one block of any length.
pub(crate) fn dequantize_block<T: Element>(codes: &[i8], absmax: f32, block: &mut [T]) {
    let step = step(absmax);
    let mut wide = [0.0_f32; STRIP];
    for (strip, codes) in block.chunks_mut(STRIP).zip(codes.chunks(STRIP)) {
        for (x, &code) in wide.iter_mut().zip(codes) {
            *x = f32::from(code) * step;
        }
        T::narrow(&wide[..strip.len()], strip);
    }
}
