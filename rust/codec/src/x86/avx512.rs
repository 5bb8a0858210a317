//! Vectors of 64 bytes.
//!
//! AVX-512 here means F, BW, DQ, VL, VBMI and VNNI: Ice Lake, Zen 4 and later.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::x86::Plain;

/// Reads 64 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load<T: Plain, const N: usize>(from: &[T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() == 64) }
    // SAFETY: the array is 64 bytes long; the load takes any alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Reads 16 floats.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_f32(from: &[f32; 16]) -> __m512 {
    _mm512_castsi512_ps(load(from))
}

/// Reads 16 half-precision values as floats, exactly.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_f16(from: &[f16; 16]) -> __m512 {
    // SAFETY: the array is 32 bytes long; the load takes any alignment.
    let halves = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
    _mm512_cvtph_ps(halves)
}

/// Reads 32 bfloat16 values as floats, exactly: those at even places, those at odd places.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_bf16(from: &[bf16; 32]) -> [__m512; 2] {
    let pairs = load(from);
    let even = _mm512_slli_epi32::<16>(pairs);
    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
}

/// Reads 16 bfloat16 values as floats, exactly, in order.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_bf16_in_order(from: &[bf16; 16]) -> __m512 {
    // SAFETY: the array is 32 bytes long; the load takes any alignment.
    let halves = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
    bf16_lanes(_mm512_cvtepu16_epi32(halves))
}

/// Writes 64 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store<T: Plain, const N: usize>(to: &mut [T; N], from: __m512i) {
    const { assert!(size_of::<[T; N]>() == 64) }
    // SAFETY: the array is 64 bytes long; the store takes any alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), from) }
}

/// Writes 32 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_half<T: Plain, const N: usize>(to: &mut [T; N], from: __m256i) {
    const { assert!(size_of::<[T; N]>() == 32) }
    // SAFETY: the array is 32 bytes long; the store takes any alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), from) }
}

/// Writes 64 bytes, past the caches if `STREAM` (then see [`crate::x86::end_stream`]).
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn write<const STREAM: bool, T: Plain, const N: usize>(to: &mut [T; N], from: __m512i) {
    const { assert!(size_of::<[T; N]>() == 64) }
    let at = to.as_mut_ptr();
    if !STREAM || cfg!(miri) || !at.addr().is_multiple_of(16) {
        store(to, from);
    } else if at.addr().is_multiple_of(64) {
        // SAFETY: the array is 64 bytes long and, as was just seen, aligned to them.
        unsafe { _mm512_stream_si512(at.cast(), from) }
    } else {
        // What NumPy allocates is aligned to 16 bytes only.
        let quarters = [
            _mm512_castsi512_si128(from),
            _mm512_extracti32x4_epi32::<1>(from),
            _mm512_extracti32x4_epi32::<2>(from),
            _mm512_extracti32x4_epi32::<3>(from),
        ];
        for (i, quarter) in quarters.into_iter().enumerate() {
            let at = at.cast::<__m128i>().wrapping_add(i);
            // SAFETY: quarter `i` of the array's 64 bytes, which are aligned to 16.
            unsafe { _mm_stream_si128(at, quarter) }
        }
    }
}

/// Writes 32 bytes, past the caches if `STREAM` (then see [`crate::x86::end_stream`]).
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn write_half<const STREAM: bool, T: Plain, const N: usize>(
    to: &mut [T; N],
    from: __m256i,
) {
    crate::x86::avx2::write::<STREAM, T, N>(to, from);
}

/// The largest magnitudes of a block, as the bits of floats, in 16 lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn magnitudes_f32(block: &[f32]) -> __m512i {
    let no_sign = _mm512_set1_epi32(0x7fff_ffff);
    block.as_chunks::<16>().0.iter().fold(_mm512_setzero_si512(), |largest, part| {
        _mm512_max_epu32(largest, _mm512_and_si512(load(part), no_sign))
    })
}

/// The largest magnitudes of a block of 16-bit floats, as the bits of those, in 16 lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn magnitudes_16_bit<T: Plain>(block: &[T]) -> __m512i {
    let no_sign = _mm512_set1_epi16(0x7fff);
    let pairs = block.as_chunks::<32>().0.iter().fold(_mm512_setzero_si512(), |largest, part| {
        _mm512_max_epu16(largest, _mm512_and_si512(load(part), no_sign))
    });
    let even = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff));
    _mm512_max_epu32(_mm512_srli_epi32::<16>(pairs), even)
}

/// The floats of half-precision bits in 32-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn f16_lanes(bits: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits))
}

/// The floats of bfloat16 bits in 32-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn bf16_lanes(bits: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
}

/// Whether none of 16 values is NaN or infinite.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn all_finite(values: __m512) -> bool {
    let infinity = _mm512_set1_ps(f32::INFINITY);
    _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(values), infinity) == u16::MAX
}

/// Values beyond 1 or -1 put there.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) fn clamp_to_one(values: __m512) -> __m512 {
    // The smaller magnitude, with the sign of the value.
    _mm512_range_ps::<0b0010>(values, _mm512_set1_ps(1.0))
}

/// The lanes of a vector.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn lanes(vector: __m512) -> [f32; 16] {
    let mut lanes = [0.0; 16];
    store(&mut lanes, _mm512_castps_si512(vector));
    lanes
}

/// Lane `i` of the result is the largest unsigned 32-bit number in vector `i`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn max_of_each(vectors: &[__m512i; 16]) -> __m512i {
    // Halve 16 vectors to 8, 4, 2, 1: each step pairs two vectors, half the lanes from each.
    let halves: [__m512i; 8] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
    });
    let quarters: [__m512i; 4] = core::array::from_fn(|i| {
        let (a, b) = (halves[2 * i], halves[2 * i + 1]);
        _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    });
    let eighths: [__m512i; 2] =
        core::array::from_fn(|i| max_of_lanes(quarters[2 * i], quarters[2 * i + 1]));
    max_of_lanes(eighths[0], eighths[1])
}

/// The maxima of 128-bit lanes 0 and 1, and 2 and 3, of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn max_of_lanes(a: __m512i, b: __m512i) -> __m512i {
    _mm512_max_epu32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b))
}

/// Lane `i` of the result is the sum of the lanes of vector `i`.
///
/// Of each 128-bit lane `(0 + 2) + (1 + 3)`; of these the same by neighbours, `(0 + 1) + (2 + 3)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn sum_of_each(vectors: &[__m512; 16]) -> __m512 {
    // As `max_of_each`.
    let halves: [__m512; 8] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    });
    let quarters: [__m512; 4] = core::array::from_fn(|i| {
        let [a, b] = [halves[2 * i], halves[2 * i + 1]].map(|v| _mm512_castps_pd(v));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    });
    let sum_of_lanes = |a, b| {
        let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        _mm512_add_ps(even, odd)
    };
    let (a, b) = (sum_of_lanes(quarters[0], quarters[1]), sum_of_lanes(quarters[2], quarters[3]));
    sum_of_lanes(a, b)
}

/// Rounds to bfloat16, ties to even, in the high half of each lane; the low half is undefined.
///
/// A NaN must have a zero low half (see [`crate::values::plain_nan`]).
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn round_to_bf16(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)))
}

/// A table times two scales, in bfloat16: 16 values, and 16 values. Subnormal ones are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn scaled_bf16(table: __m512, scales: &[f32; 2]) -> __m512i {
    let [low, high] = scales.map(|scale| _mm512_mul_ps(table, _mm512_set1_ps(scale)));
    let pairs = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 64 bytes, and any bytes are a vector of integers.
    unsafe { core::mem::transmute::<__m512bh, __m512i>(pairs) }
}

/// Reads up to 16 floats; the lanes behind them are zero.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_some(from: &[f32]) -> __m512 {
    let lanes = u16::MAX >> (16 - from.len().min(16));
    // SAFETY: the lanes of the mask are inside of the slice; the others are not read.
    unsafe { _mm512_maskz_loadu_ps(lanes, from.as_ptr()) }
}

/// Reads up to 16 bytes; those behind them are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn load_bytes<T: Plain>(from: &[T]) -> __m128i {
    const { assert!(size_of::<T>() == 1) }
    let lanes = u16::MAX >> (16 - from.len().min(16));
    // SAFETY: the lanes of the mask are inside of the slice; the others are not read.
    unsafe { _mm_maskz_loadu_epi8(lanes, from.as_ptr().cast()) }
}

/// Entries of a table; only the low 8 bits of an index count.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn lookup(table: &[f32; 256], indices: __m512i) -> __m512 {
    let indices = _mm512_and_si512(indices, _mm512_set1_epi32(0xff));
    // SAFETY: every index is in the table.
    unsafe { _mm512_i32gather_ps::<4>(indices, table.as_ptr()) }
}
