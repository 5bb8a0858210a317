//! NEON: products of signed bytes in 16 bits, or `sdot` where the machine has it.
//!
//! High halves of the table are signed here, so that sums start at zero. Four lanes have the 32
//! values of a piece, whose sums are exact as floats.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::linear::matvec::int8::{Chunk, Piece, Rounded, BLOCK, CHUNK};
use crate::linear::matvec::neon::{by_blocks, AHEAD, PIECE};
use crate::linear::weight::{Codes, Weight};
use crate::neon::{load, load_f32, nibbles, prefetch, Plain};

/// Writes the sums of some rows.
#[target_feature(enable = "neon")]
pub(crate) fn multiply(weight: &Weight<'_>, rows: Range<usize>, x: &Rounded, sums: &mut [f32]) {
    each_row(weight, rows, x, sums, |a, b, c, d| {
        // Two products of 127 by 127 fit 16 bits.
        let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
        let low = vmlal_s8(low, vget_low_s8(c), vget_low_s8(d));
        let high = vmlal_high_s8(vmull_high_s8(a, b), c, d);
        vpadalq_s16(vpaddlq_s16(low), high)
    });
}

/// The same with the dot products of later machines.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn multiply_dotprod(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &Rounded,
    sums: &mut [f32],
) {
    each_row(weight, rows, x, sums, |a, b, c, d| dot(dot(vdupq_n_s32(0), a, b), c, d));
}

/// Adds the products of bytes, four to a lane. The intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: works on registers; the feature is there.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Writes the sums of some rows. `dots` gives the sums of the products of 16 bytes and of 16
/// others, in any lanes.
#[inline]
#[target_feature(enable = "neon")]
fn each_row(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &Rounded,
    sums: &mut [f32],
    dots: impl Fn(int8x16_t, int8x16_t, int8x16_t, int8x16_t) -> int32x4_t,
) {
    let count = rows.len();
    let (cols, padded) = (weight.cols, weight.cols.next_multiple_of(CHUNK));
    match (weight.codes, x) {
        (Codes::FourBit { packed, .. }, Rounded::FourBit { chunks, table: [high, low] }) => {
            let high = vsubq_s8(signed(high), vdupq_n_s8(64));
            let table = [high, signed(low)];
            let tokens = chunks.chunks_exact(padded / CHUNK);
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                for (row, sum) in rows.clone().zip(sums) {
                    let codes = packed[row * cols / 2..(row + 1) * cols / 2].as_chunks().0;
                    let [found] = by_blocks(weight, row, 1.0, |block| {
                        let pieces = block.start / PIECE..block.end / PIECE;
                        [four_bit(codes, x, table, pieces, &dots)]
                    });
                    *sum = vaddvq_f32(found);
                }
            }
        }
        (Codes::Int8(codes), Rounded::Int8(pieces)) => {
            let tokens = pieces.chunks_exact(padded / BLOCK);
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                for (row, sum) in rows.clone().zip(sums) {
                    let codes = &codes[row * cols..(row + 1) * cols];
                    let [found] = by_blocks(weight, row, STEP, |block| {
                        let x = &x[block.start / BLOCK..];
                        [int8(&codes[block], x, &dots)]
                    });
                    *sum = vaddvq_f32(found);
                }
            }
        }
        _ => unreachable!("x was rounded for this weight"),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn signed<T: Plain>(bytes: &[T; 16]) -> int8x16_t {
    vreinterpretq_s8_u8(load(bytes))
}

/// The products of some pieces of 4-bit codes of a row.
#[inline]
#[target_feature(enable = "neon")]
fn four_bit(
    codes: &[[u8; PIECE / 2]],
    x: &[Chunk],
    table: [int8x16_t; 2],
    pieces: Range<usize>,
    dots: impl Fn(int8x16_t, int8x16_t, int8x16_t, int8x16_t) -> int32x4_t,
) -> float32x4_t {
    let mut sum = vdupq_n_f32(0.0);
    for (p, codes) in pieces.clone().zip(&codes[pieces]) {
        prefetch(codes, AHEAD);
        let (x, part) = (&x[p / 4], p % 4);
        let even = signed(&x.even.as_chunks().0[part]);
        let odd = signed(&x.odd.as_chunks().0[part]);
        let [first, second] = nibbles(load(codes));
        let [high, low] =
            table.map(|half| dots(vqtbl1q_s8(half, first), even, vqtbl1q_s8(half, second), odd));
        let integers = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<7>(high), low));
        sum = vfmaq_f32(sum, integers, load_f32(&x.step.as_chunks().0[part]));
    }
    sum
}

/// The products of a block of 8-bit codes.
#[inline]
#[target_feature(enable = "neon")]
fn int8(
    codes: &[i8],
    x: &[Piece],
    dots: impl Fn(int8x16_t, int8x16_t, int8x16_t, int8x16_t) -> int32x4_t,
) -> float32x4_t {
    let mut sum = vdupq_n_f32(0.0);
    for (codes, x) in codes.chunks(BLOCK).zip(x) {
        prefetch(codes, AHEAD);
        let end: [i8; BLOCK];
        let codes: &[i8; BLOCK] = if let Some(codes) = codes.first_chunk() {
            codes
        } else {
            end = core::array::from_fn(|i| codes.get(i).copied().unwrap_or(0));
            &end
        };
        let [a, b, c, d] = core::array::from_fn(|i| signed(&codes.as_chunks().0[i]));
        let [e, f, g, h] = core::array::from_fn(|i| signed(&x.values.as_chunks().0[i]));
        let integers = vcvtq_f32_s32(vaddq_s32(dots(a, e, b, f), dots(c, g, d, h)));
        sum = vfmaq_n_f32(sum, integers, x.step);
    }
    sum
}
