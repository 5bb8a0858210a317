//! AVX-512: 16 scales at a time. The cell of a value and the bound in it are gathered.

use std::arch::x86_64::*;

use crate::double_quant::search::{Search, DROPPED, LOWEST, SIDE};
use crate::double_quant::NESTED_BLOCKSIZE;
use crate::x86::avx2::store_half;
use crate::x86::avx512::load_f32;

/// Codes whole groups of scales; tells whether all scales survive.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn quantize(
    absmax: &[f32],
    offset: f32,
    search: &Search,
    codes: &mut [u8],
    nested: &mut [f32],
) -> bool {
    let offset = _mm512_set1_ps(offset);
    let groups = absmax.as_chunks().0.iter().zip(codes.as_chunks_mut().0);
    groups.zip(nested).fold(true, |all, ((group, codes), nested)| {
        all & quantize_group(group, offset, search, codes, nested)
    })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn quantize_group(
    group: &[f32; NESTED_BLOCKSIZE],
    offset: __m512,
    search: &Search,
    codes: &mut [u8; NESTED_BLOCKSIZE],
    nested: &mut f32,
) -> bool {
    let vectors = group.as_chunks::<16>().0;
    let none = _mm512_setzero_si512();
    let (mut largest, mut least) = (none, _mm512_set1_epi32(i32::MAX));
    for scales in vectors {
        let scales = load_f32(scales);
        let distance = _mm512_castps_si512(_mm512_abs_ps(_mm512_sub_ps(scales, offset)));
        largest = _mm512_max_epi32(largest, distance);
        least = _mm512_min_epi32(least, _mm512_castps_si512(_mm512_abs_ps(scales)));
    }
    *nested = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
    let least = f32::from_bits(_mm512_reduce_min_epi32(least) as u32);
    if search.all_survive(least, *nested) {
        write_codes::<false>(vectors, offset, search, *nested, codes)
    } else {
        write_codes::<true>(vectors, offset, search, *nested, codes)
    }
}

/// Codes a group; if asked to `CHECK`, tells whether its scales survive.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn write_codes<const CHECK: bool>(
    group: &[[f32; 16]],
    offset: __m512,
    search: &Search,
    nested: f32,
    codes: &mut [u8; NESTED_BLOCKSIZE],
) -> bool {
    let scale = _mm512_set1_ps(nested);
    let mut survive = __mmask16::MAX;
    for (scales, codes) in group.iter().zip(codes.as_chunks_mut::<16>().0) {
        let scales = load_f32(scales);
        let quotient = _mm512_div_ps(_mm512_sub_ps(scales, offset), scale);
        // NaN: zero by zero, or a scale that is not finite.
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(quotient, quotient);
        let code = count_below(search, _mm512_maskz_mov_ps(number, quotient));
        store_half(codes, _mm512_cvtepi32_epi8(code));
        if !CHECK {
            continue;
        }
        let value = gather(search.table(), code);
        let decoded = _mm512_add_ps(_mm512_mul_ps(value, scale), offset);
        let error = _mm512_abs_ps(_mm512_sub_ps(decoded, scales));
        let allowed = _mm512_mul_ps(_mm512_abs_ps(scales), _mm512_set1_ps(0.125));
        let near = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(error, allowed);
        let zero = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(scales, _mm512_setzero_ps());
        survive &= near | zero;
    }
    survive == __mmask16::MAX
}

/// See [`Search::count_below`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn count_below(search: &Search, values: __m512) -> __m512i {
    let bits = _mm512_castps_si512(values);
    let magnitude = _mm512_srli_epi32::<DROPPED>(_mm512_castps_si512(_mm512_abs_ps(values)));
    let place = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(LOWEST));
    let place = _mm512_max_epi32(place, _mm512_setzero_si512());
    let place = _mm512_min_epi32(place, _mm512_set1_epi32(SIDE as i32 - 1));
    let cell = _mm512_xor_si512(place, _mm512_srai_epi32::<31>(bits));
    let cell = _mm512_add_epi32(cell, _mm512_set1_epi32(SIDE as i32));
    // SAFETY: a cell is less than `2 * SIDE`, and three bytes follow the last one.
    let bytes = unsafe { _mm512_i32gather_epi32::<1>(cell, search.below().as_ptr().cast()) };
    let mut count = _mm512_and_si512(bytes, _mm512_set1_epi32(0xff));
    for _ in 0..search.most() {
        let passed = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(gather(search.bounds(), count), values);
        count = _mm512_mask_add_epi32(count, passed, count, _mm512_set1_epi32(1));
    }
    count
}

/// The entries at 16 places, taken modulo 256.
#[inline]
#[target_feature(enable = "avx512f")]
fn gather(table: &[f32; 256], places: __m512i) -> __m512 {
    let places = _mm512_and_si512(places, _mm512_set1_epi32(0xff));
    // SAFETY: no place is beyond the table.
    unsafe { _mm512_i32gather_ps::<4>(places, table.as_ptr()) }
}
