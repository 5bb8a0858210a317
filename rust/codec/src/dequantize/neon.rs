//! NEON: a table lookup per byte of a value.
//!
//! The table is scaled, and rounded to the output dtype, once a block, and taken apart into its
//! first, second, ... bytes: 16 of each, which one `tbl` looks up for 16 codes. Zips put the bytes
//! of a value together.

use std::arch::aarch64::*;

use crate::neon::{
    load, load_f32, narrow_bf16, narrow_f16, nibbles, prefetch, store, unzip, zip, Plain, Planes,
    STRIP,
};
use crate::values::{plain_nan, ValuesMut};

/// How far ahead codes are fetched, in bytes.
const AHEAD: usize = 2048;

/// Dequantizes whole blocks.
#[target_feature(enable = "neon")]
pub(crate) fn dequantize(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    values: ValuesMut<'_>,
) {
    let table: [float32x4_t; 4] = core::array::from_fn(|i| load_f32(&table.as_chunks().0[i]));
    let scaled = |absmax| table.map(|t| vmulq_n_f32(t, plain_nan(absmax)));
    let inputs = packed.chunks_exact(blocksize / 2).zip(absmax);
    match values {
        ValuesMut::F32(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                decode_32_bit(block, packed, Planes::new(scaled(absmax)));
            }
        }
        ValuesMut::F16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let [a, b, c, d] = scaled(absmax);
                decode_16_bit(block, packed, [narrow_f16(a, b), narrow_f16(c, d)]);
            }
        }
        ValuesMut::Bf16(values) => {
            for (block, (packed, &absmax)) in values.chunks_exact_mut(blocksize).zip(inputs) {
                let [a, b, c, d] = scaled(absmax);
                decode_16_bit(block, packed, [narrow_bf16(a, b), narrow_bf16(c, d)]);
            }
        }
    }
}

/// Looks up the codes of a block in 16 floats, 32 at a time.
#[inline]
#[target_feature(enable = "neon")]
fn decode_32_bit(block: &mut [f32], packed: &[u8], planes: Planes) {
    prefetch(packed, AHEAD);
    for (values, packed) in strips(block, packed) {
        for (values, codes) in values.as_chunks_mut::<16>().0.iter_mut().zip(codes(packed)) {
            for (to, from) in values.as_chunks_mut().0.iter_mut().zip(planes.floats(codes)) {
                store::<f32, 4>(to, vreinterpretq_u8_f32(from));
            }
        }
    }
}

/// Looks up the codes of a block in 16 rounded values, 32 at a time.
#[inline]
#[target_feature(enable = "neon")]
fn decode_16_bit<T: Plain>(block: &mut [T], packed: &[u8], table: [uint8x16_t; 2]) {
    prefetch(packed, AHEAD);
    let [first, second] = unzip(table);
    for (values, packed) in strips(block, packed) {
        for (values, codes) in values.as_chunks_mut::<16>().0.iter_mut().zip(codes(packed)) {
            let both = zip(vqtbl1q_u8(first, codes), vqtbl1q_u8(second, codes));
            for (to, from) in values.as_chunks_mut::<8>().0.iter_mut().zip(both) {
                store(to, from);
            }
        }
    }
}

/// The values of a block, a strip at a time, and the bytes of their codes.
fn strips<'a, T>(
    block: &'a mut [T],
    packed: &'a [u8],
) -> impl Iterator<Item = (&'a mut [T; STRIP], &'a [u8; STRIP / 2])> {
    block.as_chunks_mut().0.iter_mut().zip(packed.as_chunks().0)
}

/// The codes of 32 values, in order.
#[inline]
#[target_feature(enable = "neon")]
fn codes(packed: &[u8; STRIP / 2]) -> [uint8x16_t; 2] {
    let [even, odd] = nibbles(load(packed));
    zip(even, odd)
}
