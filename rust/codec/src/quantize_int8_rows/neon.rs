//! NEON: one pass over a row for its scale, one for the codes, 32 values at a time; the last
//! values are filled up with zeros.

use std::arch::aarch64::*;

use crate::neon::{
    absmax_bf16, absmax_f16, absmax_f32, strip_bf16, strip_f16, strip_f32, Plain, STRIP,
};
use crate::quantize_int8::neon::encode;
use crate::quantize_int8_rows::{factor, scalar};
use crate::values::{Element, Values};

/// Quantizes one row of any length; gives its absmax.
#[target_feature(enable = "neon")]
pub(crate) fn quantize(values: Values<'_>, codes: &mut [i8]) -> f32 {
    match values {
        Values::F32(values) => {
            row(values, codes, |strips| absmax_f32(strips), |strip| strip_f32(strip))
        }
        Values::F16(values) => {
            row(values, codes, |strips| absmax_f16(strips), |strip| strip_f16(strip))
        }
        Values::Bf16(values) => {
            row(values, codes, |strips| absmax_bf16(strips), |strip| strip_bf16(strip))
        }
    }
}

/// Quantizes a row. What depends on the dtype: the largest `magnitude` of whole strips, `load` of
/// a strip.
#[inline]
#[target_feature(enable = "neon")]
fn row<T: Element + Plain>(
    values: &[T],
    codes: &mut [i8],
    magnitude: impl Fn(&[T]) -> f32,
    load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8],
) -> f32 {
    let (strips, rest) = values.as_chunks::<STRIP>();
    let (bytes, rest_codes) = codes.as_chunks_mut::<STRIP>();
    let mut last = [T::ZERO; STRIP];
    last[..rest.len()].copy_from_slice(rest);
    let (most, of_rest) = (magnitude(strips.as_flattened()), magnitude(&last));
    if !(most.is_finite() && of_rest.is_finite()) {
        return scalar::quantize_row(values, codes);
    }
    let absmax = most.max(of_rest);
    encode(strips, factor(absmax), bytes, &load);
    if !rest.is_empty() {
        let mut bytes = [[0_i8; STRIP]];
        encode(&[last], factor(absmax), &mut bytes, load);
        rest_codes.copy_from_slice(&bytes[0][..rest_codes.len()]);
    }
    absmax
}
