//! AVX-512: codes widened and multiplied, 16 or 32 at a time. Memory sets the speed.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::dequantize_int8::step;
use crate::values::{Stores, ValuesMut};
use crate::x86::avx2::{load, load_half};
use crate::x86::avx512::{round_to_bf16, write, write_half};
use crate::x86::{end_stream, prefetch};

/// How far ahead codes are fetched, in bytes.
const AHEAD: usize = 4096;

/// Dequantizes whole blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn dequantize(
    codes: &[i8],
    absmax: &[f32],
    blocksize: usize,
    stores: Stores,
    values: ValuesMut<'_>,
) {
    match stores {
        Stores::Cached => blocks::<false>(codes, absmax, blocksize, values),
        Stores::Streaming => {
            blocks::<true>(codes, absmax, blocksize, values);
            end_stream();
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn blocks<const STREAM: bool>(
    codes: &[i8],
    absmax: &[f32],
    blocksize: usize,
    values: ValuesMut<'_>,
) {
    let step = |absmax| _mm512_set1_ps(step(absmax));
    let inputs = codes.chunks_exact(blocksize).zip(absmax);
    match values {
        ValuesMut::F32(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_f32::<STREAM>(block, codes, step(absmax));
            }
        }
        ValuesMut::F16(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_f16::<STREAM>(block, codes, step(absmax));
            }
        }
        ValuesMut::Bf16(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_bf16::<STREAM>(block, codes, step(absmax));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode_f32<const STREAM: bool>(block: &mut [f32], codes: &[i8], step: __m512) {
    prefetch(codes, AHEAD);
    for (values, codes) in block.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks().0) {
        write::<STREAM, _, _>(values, _mm512_castps_si512(product(codes, step)));
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode_f16<const STREAM: bool>(block: &mut [f16], codes: &[i8], step: __m512) {
    prefetch(codes, AHEAD);
    for (values, codes) in block.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks().0) {
        let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(product(codes, step));
        write_half::<STREAM, _, _>(values, halves);
    }
}

/// Sixteen codes times the step of their block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn product(codes: &[i8; 16], step: __m512) -> __m512 {
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_half(codes))), step)
}

/// Even and odd values apart, so that one shift and one blend bring 32 of them together.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode_bf16<const STREAM: bool>(block: &mut [bf16], codes: &[i8], step: __m512) {
    prefetch(codes, AHEAD);
    for (values, codes) in block.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks().0) {
        let pairs = _mm512_cvtepi8_epi16(load::<_, 32>(codes));
        let even = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs));
        let odd = _mm512_srai_epi32::<16>(pairs);
        let even = round_to_bf16(_mm512_mul_ps(_mm512_cvtepi32_ps(even), step));
        let odd = round_to_bf16(_mm512_mul_ps(_mm512_cvtepi32_ps(odd), step));
        let even = _mm512_srli_epi32::<16>(even);
        write::<STREAM, _, _>(values, _mm512_mask_blend_epi16(0xaaaa_aaaa, even, odd));
    }
}
