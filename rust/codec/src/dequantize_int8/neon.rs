//! NEON: codes widened and multiplied, 16 at a time.

use std::arch::aarch64::*;

use crate::dequantize_int8::step;
use crate::neon::{narrow_bf16, narrow_f16, prefetch, store, widen_i8};
use crate::values::ValuesMut;

/// How far ahead codes are fetched, in bytes.
const AHEAD: usize = 4096;
/// Codes that are read together.
const PIECE: usize = 16;

/// Dequantizes whole blocks.
#[target_feature(enable = "neon")]
pub(crate) fn dequantize(codes: &[i8], absmax: &[f32], blocksize: usize, values: ValuesMut<'_>) {
    let inputs = codes.chunks_exact(blocksize).zip(absmax);
    match values {
        ValuesMut::F32(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let step = step(absmax);
                decode(block, codes, |values, codes| {
                    let bytes = products(codes, step).map(|x| vreinterpretq_u8_f32(x));
                    for (to, from) in values.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
                        store(to, from);
                    }
                });
            }
        }
        ValuesMut::F16(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let step = step(absmax);
                decode(block, codes, |values, codes| {
                    let [a, b, c, d] = products(codes, step);
                    let bytes = [narrow_f16(a, b), narrow_f16(c, d)];
                    for (to, from) in values.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
                        store(to, from);
                    }
                });
            }
        }
        ValuesMut::Bf16(values) => {
            for (block, (codes, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let step = step(absmax);
                decode(block, codes, |values, codes| {
                    let [a, b, c, d] = products(codes, step);
                    let bytes = [narrow_bf16(a, b), narrow_bf16(c, d)];
                    for (to, from) in values.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
                        store(to, from);
                    }
                });
            }
        }
    }
}

/// Decodes a block piece by piece.
#[inline]
#[target_feature(enable = "neon")]
fn decode<T>(block: &mut [T], codes: &[i8], piece: impl Fn(&mut [T; PIECE], &[i8; PIECE])) {
    prefetch(codes, AHEAD);
    for (values, codes) in block.as_chunks_mut().0.iter_mut().zip(codes.as_chunks().0) {
        piece(values, codes);
    }
}

/// Codes times the step of their block.
#[inline]
#[target_feature(enable = "neon")]
fn products(codes: &[i8; PIECE], step: f32) -> [float32x4_t; 4] {
    widen_i8(codes).map(|codes| vmulq_n_f32(codes, step))
}
