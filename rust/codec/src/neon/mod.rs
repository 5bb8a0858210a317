//! What the NEON bodies of several operations share: loads, stores, tables, maxima, conversions.
//!
//! Vectors of 16 bytes. NEON is part of every 64-bit ARM processor that runs a system with a
//! standard library.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

pub(crate) use crate::plain::Plain;
use crate::quantize::scalar::absmax_from_bits;

/// Values that are packed together: the smallest block.
pub(crate) const STRIP: usize = 32;

/// Fetches the cache line `ahead` bytes after a slice's start into L1; there may be none.
#[inline(always)]
pub(crate) fn prefetch<T>(from: &[T], ahead: usize) {
    let address = from.as_ptr().cast::<u8>().wrapping_add(ahead);
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

/// Reads 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn load<T: Plain, const N: usize>(from: &[T; N]) -> uint8x16_t {
    const { assert!(size_of::<[T; N]>() == 16) }
    // SAFETY: the array is 16 bytes long; the load takes any alignment.
    unsafe { vld1q_u8(from.as_ptr().cast()) }
}

/// Writes 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn store<T: Plain, const N: usize>(to: &mut [T; N], from: uint8x16_t) {
    const { assert!(size_of::<[T; N]>() == 16) }
    // SAFETY: the array is 16 bytes long; the store takes any alignment.
    unsafe { vst1q_u8(to.as_mut_ptr().cast(), from) }
}

/// Reads 4 floats.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn load_f32(from: &[f32; 4]) -> float32x4_t {
    vreinterpretq_f32_u8(load(from))
}

/// Reads a strip of floats.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn strip_f32(strip: &[f32; STRIP]) -> [float32x4_t; 8] {
    core::array::from_fn(|i| load_f32(&strip.as_chunks().0[i]))
}

/// Reads a strip of half-precision values as floats, exactly.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn strip_f16(strip: &[f16; STRIP]) -> [float32x4_t; 8] {
    core::array::from_fn(|i| {
        let halves = vreinterpretq_u16_u8(load::<_, 8>(&strip.as_chunks().0[i / 2]));
        widen_f16(if i % 2 == 0 { vget_low_u16(halves) } else { vget_high_u16(halves) })
    })
}

/// Reads a strip of bfloat16 values as floats, exactly.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn strip_bf16(strip: &[bf16; STRIP]) -> [float32x4_t; 8] {
    core::array::from_fn(|i| {
        let halves = vreinterpretq_u16_u8(load::<_, 8>(&strip.as_chunks().0[i / 2]));
        let wide = if i % 2 == 0 {
            vshll_n_u16::<16>(vget_low_u16(halves))
        } else {
            vshll_high_n_u16::<16>(halves)
        };
        vreinterpretq_f32_u32(wide)
    })
}

/// The high and the low halves of bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn nibbles(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    [vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15))]
}

/// Bytes of `a` and `b` in turn.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn zip(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
    [vzip1q_u8(a, b), vzip2q_u8(a, b)]
}

/// Pairs of bytes of `a` and `b` in turn.
#[inline]
#[target_feature(enable = "neon")]
fn zip_pairs(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
    let [a, b] = [vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)];
    [vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))]
}

/// The even bytes of two vectors, and the odd ones.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unzip([a, b]: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)]
}

/// A table of 16 floats taken apart: the first byte of each, the second, third and fourth.
#[derive(Clone, Copy)]
pub(crate) struct Planes([uint8x16_t; 4]);

impl Planes {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn new(table: [float32x4_t; 4]) -> Self {
        let [a, b, c, d] = table.map(|floats| vreinterpretq_u8_f32(floats));
        // Bytes 0 and 2 of each float, then 1 and 3.
        let ([ab, more_ab], [cd, more_cd]) = (unzip([a, b]), unzip([c, d]));
        let ([first, third], [second, fourth]) = (unzip([ab, cd]), unzip([more_ab, more_cd]));
        Self([first, second, third, fourth])
    }

    /// The floats that 16 codes stand for, in their order.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn floats(self, codes: uint8x16_t) -> [float32x4_t; 4] {
        let [first, second, third, fourth] = self.0.map(|plane| vqtbl1q_u8(plane, codes));
        let (low, high) = (zip(first, second), zip(third, fourth));
        let ([a, b], [c, d]) = (zip_pairs(low[0], high[0]), zip_pairs(low[1], high[1]));
        [a, b, c, d].map(|bytes| vreinterpretq_f32_u8(bytes))
    }
}

/// Widens 16 integers to floats.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn widen_i8(integers: &[i8; 16]) -> [float32x4_t; 4] {
    let integers = vreinterpretq_s8_u8(load(integers));
    let (low, high) = (vmovl_s8(vget_low_s8(integers)), vmovl_high_s8(integers));
    [
        vmovl_s16(vget_low_s16(low)),
        vmovl_high_s16(low),
        vmovl_s16(vget_low_s16(high)),
        vmovl_high_s16(high),
    ]
    .map(|integers| vcvtq_f32_s32(integers))
}

/// The largest magnitude of whole strips; the canonical NaN if there is one.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn absmax_f32(strips: &[f32]) -> f32 {
    let no_sign = vdupq_n_u32(0x7fff_ffff);
    let maxima = strips.as_chunks::<16>().0.iter().fold([vdupq_n_u32(0); 4], |maxima, line| {
        core::array::from_fn(|i| {
            let bits = vreinterpretq_u32_u8(load::<_, 4>(&line.as_chunks().0[i]));
            vmaxq_u32(maxima[i], vandq_u32(bits, no_sign))
        })
    });
    let [a, b, c, d] = maxima;
    absmax_from_bits(vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d))))
}

/// The largest magnitude of whole strips; the canonical NaN if there is one.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn absmax_f16(strips: &[f16]) -> f32 {
    let wide = widen_f16(vdup_n_u16(largest_16_bit(strips)));
    absmax_from_bits(vgetq_lane_u32::<0>(vreinterpretq_u32_f32(wide)))
}

/// The largest magnitude of whole strips; the canonical NaN if there is one.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn absmax_bf16(strips: &[bf16]) -> f32 {
    absmax_from_bits(u32::from(largest_16_bit(strips)) << 16)
}

/// The bits of the largest magnitude of 16-bit floats.
#[inline]
#[target_feature(enable = "neon")]
fn largest_16_bit<T: Plain>(strips: &[T]) -> u16 {
    let no_sign = vdupq_n_u16(0x7fff);
    let maxima = strips.as_chunks::<STRIP>().0.iter().fold([vdupq_n_u16(0); 4], |maxima, line| {
        core::array::from_fn(|i| {
            let bits = vreinterpretq_u16_u8(load::<_, 8>(&line.as_chunks().0[i]));
            vmaxq_u16(maxima[i], vandq_u16(bits, no_sign))
        })
    });
    let [a, b, c, d] = maxima;
    vmaxvq_u16(vmaxq_u16(vmaxq_u16(a, b), vmaxq_u16(c, d)))
}

/// Widens half precision, exactly. The intrinsic is newer than the oldest Rust that must do.
#[inline]
#[target_feature(enable = "neon")]
fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let floats;
    // SAFETY: converts registers; part of NEON.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            out(vreg) floats,
            in(vreg) halves,
            options(pure, nomem, nostack),
        );
    }
    floats
}

/// Rounds 8 values to half precision, ties to even.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn narrow_f16(low: float32x4_t, high: float32x4_t) -> uint8x16_t {
    let halves;
    // SAFETY: converts registers; part of NEON.
    unsafe {
        asm!(
            "fcvtn {0:v}.4h, {1:v}.4s",
            "fcvtn2 {0:v}.8h, {2:v}.4s",
            out(vreg) halves,
            in(vreg) low,
            in(vreg) high,
            options(pure, nomem, nostack),
        );
    }
    halves
}

/// Rounds 8 values to bfloat16, ties to even.
///
/// A NaN must have a zero low half (see [`crate::values::plain_nan`]).
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn narrow_bf16(low: float32x4_t, high: float32x4_t) -> uint8x16_t {
    let rounded = |x| {
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        vreinterpretq_u16_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))))
    };
    vreinterpretq_u8_u16(vuzp2q_u16(rounded(low), rounded(high))) // the high halves
}
