//! AVX2: 8 scales at a time. The cell of a value and the bound in it are gathered.

use std::arch::x86_64::*;

use crate::double_quant::search::{Search, DROPPED, LOWEST, SIDE};
use crate::double_quant::NESTED_BLOCKSIZE;
use crate::x86::avx2::{lanes, load_f32};

/// Codes whole groups of scales; tells whether all scales survive.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn quantize(
    absmax: &[f32],
    offset: f32,
    search: &Search,
    codes: &mut [u8],
    nested: &mut [f32],
) -> bool {
    let offset = _mm256_set1_ps(offset);
    let groups = absmax.as_chunks().0.iter().zip(codes.as_chunks_mut().0);
    groups.zip(nested).fold(true, |all, ((group, codes), nested)| {
        all & quantize_group(group, offset, search, codes, nested)
    })
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn quantize_group(
    group: &[f32; NESTED_BLOCKSIZE],
    offset: __m256,
    search: &Search,
    codes: &mut [u8; NESTED_BLOCKSIZE],
    nested: &mut f32,
) -> bool {
    let vectors = group.as_chunks::<8>().0;
    let (mut largest, mut least) = (_mm256_setzero_si256(), _mm256_set1_epi32(i32::MAX));
    for scales in vectors {
        let scales = load_f32(scales);
        let distance = _mm256_castps_si256(abs(_mm256_sub_ps(scales, offset)));
        largest = _mm256_max_epi32(largest, distance);
        least = _mm256_min_epi32(least, _mm256_castps_si256(abs(scales)));
    }
    let [largest, least] =
        [largest, least].map(|v| lanes(_mm256_castsi256_ps(v)).map(f32::to_bits).into_iter());
    *nested = f32::from_bits(largest.fold(0, u32::max));
    let least = f32::from_bits(least.fold(u32::MAX, u32::min));
    if search.all_survive(least, *nested) {
        write_codes::<false>(vectors, offset, search, *nested, codes)
    } else {
        write_codes::<true>(vectors, offset, search, *nested, codes)
    }
}

/// Codes a group; if asked to `CHECK`, tells whether its scales survive.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn write_codes<const CHECK: bool>(
    group: &[[f32; 8]],
    offset: __m256,
    search: &Search,
    nested: f32,
    codes: &mut [u8; NESTED_BLOCKSIZE],
) -> bool {
    let scale = _mm256_set1_ps(nested);
    let mut survive = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (scales, codes) in group.iter().zip(codes.as_chunks_mut::<8>().0) {
        let scales = load_f32(scales);
        let quotient = _mm256_div_ps(_mm256_sub_ps(scales, offset), scale);
        // NaN: zero by zero, or a scale that is not finite.
        let number = _mm256_cmp_ps::<_CMP_ORD_Q>(quotient, quotient);
        let code = count_below(search, _mm256_and_ps(number, quotient));
        *codes = bytes(code);
        if !CHECK {
            continue;
        }
        let value = gather(search.table(), code);
        let decoded = _mm256_add_ps(_mm256_mul_ps(value, scale), offset);
        let error = abs(_mm256_sub_ps(decoded, scales));
        let allowed = _mm256_mul_ps(abs(scales), _mm256_set1_ps(0.125));
        let near = _mm256_cmp_ps::<_CMP_LE_OQ>(error, allowed);
        let zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(scales, _mm256_setzero_ps());
        survive = _mm256_and_ps(survive, _mm256_or_ps(near, zero));
    }
    _mm256_movemask_ps(survive) == 0xff
}

/// See [`Search::count_below`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn count_below(search: &Search, values: __m256) -> __m256i {
    let bits = _mm256_castps_si256(values);
    let magnitude = _mm256_srli_epi32::<{ DROPPED as i32 }>(_mm256_castps_si256(abs(values)));
    let place = _mm256_sub_epi32(magnitude, _mm256_set1_epi32(LOWEST));
    let place = _mm256_max_epi32(place, _mm256_setzero_si256());
    let place = _mm256_min_epi32(place, _mm256_set1_epi32(SIDE as i32 - 1));
    let cell = _mm256_xor_si256(place, _mm256_srai_epi32::<31>(bits));
    let cell = _mm256_add_epi32(cell, _mm256_set1_epi32(SIDE as i32));
    // SAFETY: a cell is less than `2 * SIDE`, and three bytes follow the last one.
    let bytes = unsafe { _mm256_i32gather_epi32::<1>(search.below().as_ptr().cast(), cell) };
    let mut count = _mm256_and_si256(bytes, _mm256_set1_epi32(0xff));
    for _ in 0..search.most() {
        let passed = _mm256_cmp_ps::<_CMP_LT_OQ>(gather(search.bounds(), count), values);
        count = _mm256_sub_epi32(count, _mm256_castps_si256(passed)); // -1 where it is passed
    }
    count
}

/// The entries at 8 places, taken modulo 256.
#[inline]
#[target_feature(enable = "avx2")]
fn gather(table: &[f32; 256], places: __m256i) -> __m256 {
    let places = _mm256_and_si256(places, _mm256_set1_epi32(0xff));
    // SAFETY: no place is beyond the table.
    unsafe { _mm256_i32gather_ps::<4>(table.as_ptr(), places) }
}

/// Numbers below 256 as bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes(numbers: __m256i) -> [u8; 8] {
    let (low, high) = (_mm256_castsi256_si128(numbers), _mm256_extracti128_si256::<1>(numbers));
    let words = _mm_packus_epi32(low, high);
    _mm_cvtsi128_si64(_mm_packus_epi16(words, words)).to_le_bytes()
}

#[inline]
#[target_feature(enable = "avx2")]
fn abs(values: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), values)
}
