//! AVX-512: one pass over a row for its scale, one for the codes, 64 values at a time; the last
//! values are filled up with zeros.

use std::arch::x86_64::*;

use crate::quantize_int8::avx512::{
    pack_even_odd, pack_in_order, strip_bf16, strip_f16, strip_f32, AHEAD, STRIP,
};
use crate::quantize_int8_rows::{factor, scalar};
use crate::values::{Element, Values};
use crate::x86::avx512::{bf16_lanes, f16_lanes, lanes, magnitudes_16_bit, magnitudes_f32, store};
use crate::x86::{prefetch_l2, Plain};

/// Quantizes one row of any length; gives its absmax.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn quantize(values: Values<'_>, codes: &mut [i8]) -> f32 {
    match values {
        Values::F32(values) => row(
            values,
            codes,
            |strips| _mm512_castsi512_ps(magnitudes_f32(strips)),
            |strip| strip_f32(strip),
            |codes| pack_in_order(codes),
        ),
        Values::F16(values) => row(
            values,
            codes,
            |strips| f16_lanes(magnitudes_16_bit(strips)),
            |strip| strip_f16(strip),
            |codes| pack_in_order(codes),
        ),
        Values::Bf16(values) => row(
            values,
            codes,
            |strips| bf16_lanes(magnitudes_16_bit(strips)),
            |strip| strip_bf16(strip),
            |codes| pack_even_odd(codes),
        ),
    }
}

/// Quantizes a row. What depends on the dtype: `largest` magnitudes of whole strips in each lane,
/// `load` of a strip, `pack` of what was loaded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn row<T: Element + Plain>(
    values: &[T],
    codes: &mut [i8],
    largest: impl Fn(&[T]) -> __m512,
    load: impl Fn(&[T; STRIP]) -> [__m512; 4],
    pack: impl Fn([__m512i; 4]) -> __m512i,
) -> f32 {
    let (strips, rest) = values.as_chunks::<STRIP>();
    let (bytes, rest_codes) = codes.as_chunks_mut::<STRIP>();
    let mut last = [T::ZERO; STRIP];
    last[..rest.len()].copy_from_slice(rest);
    let absmax = largest_lane(largest(strips.as_flattened())).max(largest_lane(largest(&last)));
    let absmax = f32::from_bits(absmax);
    if !absmax.is_finite() {
        return scalar::quantize_row(values, codes);
    }
    let factor = _mm512_set1_ps(factor(absmax));
    let code = |x| _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
    for (strip, bytes) in strips.iter().zip(bytes) {
        for line in 0..size_of_val(strip) / 64 {
            prefetch_l2(strip, AHEAD + 64 * line);
        }
        store(bytes, pack(load(strip).map(code)));
    }
    if !rest.is_empty() {
        let mut bytes = [0_i8; STRIP];
        store(&mut bytes, pack(load(&last).map(code)));
        rest_codes.copy_from_slice(&bytes[..rest_codes.len()]);
    }
    absmax
}

/// The bits of the largest magnitude: as integers, so that NaN, which is the largest, is seen.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest_lane(magnitudes: __m512) -> u32 {
    lanes(magnitudes).map(f32::to_bits).into_iter().fold(0, u32::max)
}
