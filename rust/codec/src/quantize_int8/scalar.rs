//! The reference body: plain Rust, any machine.

use crate::quantize::scalar::block_absmax;
use crate::quantize_int8::factor;
use crate::values::{with_slice, Element, Stores, Values};

/// Values that are widened and coded together.
const STRIP: usize = 32;

/// Adding this to `|x| < 2^22` rounds it to an integer, half to even, in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// Quantizes whole blocks; tells whether all values were finite.
pub(crate) fn quantize(
    values: Values<'_>,
    blocksize: usize,
    _stores: Stores,
    codes: &mut [i8],
    absmax: &mut [f32],
) -> bool {
    with_slice!(values, Values, v => {
        let outputs = codes.chunks_exact_mut(blocksize).zip(absmax);
        v.chunks_exact(blocksize).zip(outputs).fold(true, |finite, (block, (codes, absmax))| {
            quantize_block(block, codes, absmax);
            finite && absmax.is_finite()
        })
    })
}

/// Zeroes the codes of the blocks that hold NaN or infinity, and puts their scales right.
#[cold]
pub(crate) fn repair<T: Element>(
    values: &[T],
    blocksize: usize,
    codes: &mut [i8],
    absmax: &mut [f32],
) {
    let outputs = codes.chunks_exact_mut(blocksize).zip(absmax);
    for (block, (codes, absmax)) in values.chunks_exact(blocksize).zip(outputs) {
        if !absmax.is_finite() {
            quantize_block(block, codes, absmax);
        }
    }
}

/// Quantizes one block of any length.
pub(crate) fn quantize_block<T: Element>(block: &[T], codes: &mut [i8], absmax: &mut f32) {
    *absmax = block_absmax(block);
    if !absmax.is_finite() {
        codes.fill(0);
        return;
    }
    encode(block, factor(*absmax), codes);
}

/// Codes finite values of any number.
pub(crate) fn encode<T: Element>(values: &[T], factor: f32, codes: &mut [i8]) {
    let mut wide = [0.0_f32; STRIP];
    for (strip, codes) in values.chunks(STRIP).zip(codes.chunks_mut(STRIP)) {
        T::widen(strip, &mut wide[..strip.len()]);
        for (code, x) in codes.iter_mut().zip(&wide) {
            *code = (x * factor + MAGIC).to_bits() as i8;
        }
    }
}
