//! The reference body: plain Rust, any machine.

use crate::quantize::scalar::block_absmax;
use crate::quantize_int8::scalar::encode;
use crate::quantize_int8_rows::factor;
use crate::values::{with_slice, Element, Values};

/// Quantizes one row of any length; gives its absmax.
pub(crate) fn quantize(values: Values<'_>, codes: &mut [i8]) -> f32 {
    with_slice!(values, Values, v => quantize_row(v, codes))
}

/// The same for a row of one dtype. Codes are 0 where the row holds NaN or infinity.
pub(crate) fn quantize_row<T: Element>(row: &[T], codes: &mut [i8]) -> f32 {
    let absmax = block_absmax(row);
    if absmax.is_finite() {
        encode(row, factor(absmax), codes);
    } else {
        codes.fill(0);
    }
    absmax
}
