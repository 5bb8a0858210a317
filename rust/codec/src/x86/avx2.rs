//! Vectors of 32 bytes.
//!
//! AVX2 here means AVX2, FMA and F16C: Haswell, Zen and later.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::x86::Plain;

/// Reads 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load<T: Plain, const N: usize>(from: &[T; N]) -> __m256i {
    const { assert!(size_of::<[T; N]>() == 32) }
    // SAFETY: the array is 32 bytes long; the load takes any alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// Reads 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_half<T: Plain, const N: usize>(from: &[T; N]) -> __m128i {
    const { assert!(size_of::<[T; N]>() == 16) }
    // SAFETY: the array is 16 bytes long; the load takes any alignment.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// Reads 8 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_quarter(from: &[i8; 8]) -> __m128i {
    // SAFETY: the array is 8 bytes long; the load takes any alignment.
    unsafe { _mm_loadl_epi64(from.as_ptr().cast()) }
}

/// Reads 8 floats.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_f32(from: &[f32; 8]) -> __m256 {
    _mm256_castsi256_ps(load(from))
}

/// Reads 8 half-precision values as floats, exactly.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn load_f16(from: &[f16; 8]) -> __m256 {
    _mm256_cvtph_ps(load_half(from))
}

/// Reads 16 bfloat16 values as floats, exactly: those at even places, those at odd places.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_bf16(from: &[bf16; 16]) -> [__m256; 2] {
    let pairs = load(from);
    let even = _mm256_slli_epi32::<16>(pairs);
    let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
    [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
}

/// Reads 8 bfloat16 values as floats, exactly, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_bf16_in_order(from: &[bf16; 8]) -> __m256 {
    bf16_lanes(_mm256_cvtepu16_epi32(load_half(from)))
}

/// Writes 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn store<T: Plain, const N: usize>(to: &mut [T; N], from: __m256i) {
    const { assert!(size_of::<[T; N]>() == 32) }
    // SAFETY: the array is 32 bytes long; the store takes any alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), from) }
}

/// Writes 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn store_half<T: Plain, const N: usize>(to: &mut [T; N], from: __m128i) {
    const { assert!(size_of::<[T; N]>() == 16) }
    // SAFETY: the array is 16 bytes long; the store takes any alignment.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), from) }
}

/// Writes 32 bytes, past the caches if `STREAM` (then see [`crate::x86::end_stream`]).
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn write<const STREAM: bool, T: Plain, const N: usize>(to: &mut [T; N], from: __m256i) {
    const { assert!(size_of::<[T; N]>() == 32) }
    let at = to.as_mut_ptr();
    if !STREAM || cfg!(miri) || !at.addr().is_multiple_of(16) {
        store(to, from);
    } else if at.addr().is_multiple_of(32) {
        // SAFETY: the array is 32 bytes long and, as was just seen, aligned to them.
        unsafe { _mm256_stream_si256(at.cast(), from) }
    } else {
        let (low, high) = (_mm256_castsi256_si128(from), _mm256_extracti128_si256::<1>(from));
        let at = at.cast::<__m128i>();
        // SAFETY: the first half of the array's 32 bytes, which are aligned to 16.
        unsafe { _mm_stream_si128(at, low) }
        // SAFETY: the second half.
        unsafe { _mm_stream_si128(at.wrapping_add(1), high) }
    }
}

/// Writes 16 bytes, past the caches if `STREAM` (then see [`crate::x86::end_stream`]).
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn write_half<const STREAM: bool, T: Plain, const N: usize>(
    to: &mut [T; N],
    from: __m128i,
) {
    const { assert!(size_of::<[T; N]>() == 16) }
    let at = to.as_mut_ptr();
    if !STREAM || cfg!(miri) || !at.addr().is_multiple_of(16) {
        store_half(to, from);
    } else {
        // SAFETY: the array is 16 bytes long and, as was just seen, aligned to them.
        unsafe { _mm_stream_si128(at.cast(), from) }
    }
}

/// The largest magnitudes of a block, as the bits of floats, in 8 lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn magnitudes_f32(block: &[f32]) -> __m256i {
    let no_sign = _mm256_set1_epi32(0x7fff_ffff);
    block.as_chunks::<8>().0.iter().fold(_mm256_setzero_si256(), |largest, part| {
        _mm256_max_epu32(largest, _mm256_and_si256(load(part), no_sign))
    })
}

/// The largest magnitudes of a block of 16-bit floats, as the bits of those, in 8 lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn magnitudes_16_bit<T: Plain>(block: &[T]) -> __m256i {
    let no_sign = _mm256_set1_epi16(0x7fff);
    let pairs = block.as_chunks::<16>().0.iter().fold(_mm256_setzero_si256(), |largest, part| {
        _mm256_max_epu16(largest, _mm256_and_si256(load(part), no_sign))
    });
    let even = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
    _mm256_max_epu32(_mm256_srli_epi32::<16>(pairs), even)
}

/// The floats of half-precision bits in 32-bit lanes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn f16_lanes(bits: __m256i) -> __m256 {
    // Each 128-bit half has its four numbers twice: take one of each.
    let words = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(bits, bits));
    _mm256_cvtph_ps(_mm256_castsi256_si128(words))
}

/// The floats of bfloat16 bits in 32-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn bf16_lanes(bits: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
}

/// Whether none of 8 values is NaN or infinite.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn all_finite(values: __m256) -> bool {
    let magnitudes = _mm256_andnot_ps(_mm256_set1_ps(-0.0), values);
    let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(magnitudes, _mm256_set1_ps(f32::INFINITY));
    _mm256_movemask_ps(finite) == 0xff
}

/// Values beyond 1 or -1 put there.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn clamp_to_one(values: __m256) -> __m256 {
    // Of a NaN the second operand is kept.
    let below = _mm256_min_ps(_mm256_set1_ps(1.0), values);
    _mm256_max_ps(_mm256_set1_ps(-1.0), below)
}

/// The lanes of a vector.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn lanes(vector: __m256) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    store(&mut lanes, _mm256_castps_si256(vector));
    lanes
}

/// Lane `i` of the result is the largest unsigned 32-bit number in vector `i`.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn max_of_each(vectors: &[__m256i; 8]) -> __m256i {
    // Halve 8 vectors to 4, 2, 1: each step pairs two vectors, half the lanes from each.
    let halves: [__m256i; 4] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm256_max_epu32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b))
    });
    let quarters: [__m256i; 2] = core::array::from_fn(|i| {
        let (a, b) = (halves[2 * i], halves[2 * i + 1]);
        _mm256_max_epu32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
    });
    let [a, b] = quarters;
    _mm256_max_epu32(
        _mm256_permute2x128_si256::<0x20>(a, b),
        _mm256_permute2x128_si256::<0x31>(a, b),
    )
}

/// Lane `i` of the result is the sum of the lanes of vector `i`.
///
/// Of each 128-bit lane `(0 + 2) + (1 + 3)`, then of both.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn sum_of_each(vectors: &[__m256; 8]) -> __m256 {
    // As `max_of_each`.
    let halves: [__m256; 4] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b))
    });
    let quarters: [__m256; 2] = core::array::from_fn(|i| {
        let [a, b] = [halves[2 * i], halves[2 * i + 1]].map(|v| _mm256_castps_pd(v));
        let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
        _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    });
    let [a, b] = quarters;
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}

/// Rounds to bfloat16, ties to even, in the high half of each lane; the low half is undefined.
///
/// A NaN must have a zero low half (see [`crate::values::plain_nan`]).
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn round_to_bf16(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
}

/// Reads 8 bytes as 32-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_eight(from: &[u8; 8]) -> __m256i {
    // SAFETY: the array is 8 bytes long; the load takes any alignment.
    _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(from.as_ptr().cast()) })
}

/// Entries of a table; only the low 8 bits of an index count.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn lookup(table: &[f32; 256], indices: __m256i) -> __m256 {
    let indices = _mm256_and_si256(indices, _mm256_set1_epi32(0xff));
    // SAFETY: every index is in the table.
    unsafe { _mm256_i32gather_ps::<4>(table.as_ptr(), indices) }
}
