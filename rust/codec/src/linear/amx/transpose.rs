//! Tiles of sums, turned to rows of tokens.

use std::arch::x86_64::*;

use crate::linear::amx::tiles::{LINES, TOKENS};
use crate::scratch::Line;
use crate::x86::avx512::{load, store};

/// Adds nothing, writes everything: `sums[first_token + m][column + n] = tile[n][m]`.
///
/// `sums` is (tokens, width); what lies outside of it is left out.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn write_transposed(
    tile: &[Line; LINES],
    sums: &mut [f32],
    width: usize,
    first_token: usize,
    column: usize,
) {
    let rows = sums.chunks_exact_mut(width).skip(first_token).take(TOKENS);
    let turned = transpose(&core::array::from_fn(|i| load(&tile[i].0)));
    for (row, values) in rows.zip(turned) {
        let row = &mut row[column..];
        if let Some(row) = row.first_chunk_mut::<16>() {
            store(row, values);
        } else {
            let mut room = [0.0_f32; 16];
            store(&mut room, values);
            row.copy_from_slice(&room[..row.len()]);
        }
    }
}

/// Lane `j` of vector `i` becomes lane `i` of vector `j`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &[__m512i; 16]) -> [__m512i; 16] {
    // Pairs of rows, then fours, within each 128-bit lane; then the lanes.
    let pairs: [__m512i; 16] = core::array::from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        if i % 2 == 0 {
            _mm512_unpacklo_epi32(a, b)
        } else {
            _mm512_unpackhi_epi32(a, b)
        }
    });
    // fours[4 g + j]: lanes j, j + 4, j + 8, j + 12 of rows 4 g to 4 g + 3.
    let fours: [__m512i; 16] = core::array::from_fn(|i| {
        let (group, j) = (i & !3, i & 3);
        let (a, b) = (pairs[group + j / 2], pairs[group + 2 + j / 2]);
        if j % 2 == 0 {
            _mm512_unpacklo_epi64(a, b)
        } else {
            _mm512_unpackhi_epi64(a, b)
        }
    });
    let lanes: [[__m512i; 4]; 4] = core::array::from_fn(|j| {
        transpose_lanes([fours[j], fours[4 + j], fours[8 + j], fours[12 + j]])
    });
    core::array::from_fn(|i| lanes[i % 4][i / 4])
}

/// 128-bit lane `j` of vector `i` becomes lane `i` of vector `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_lanes([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
    let (ef, gh) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(ab, cd),
        _mm512_shuffle_i32x4::<0xdd>(ab, cd),
        _mm512_shuffle_i32x4::<0x88>(ef, gh),
        _mm512_shuffle_i32x4::<0xdd>(ef, gh),
    ]
}

/// Writes 64 columns of 32 tokens, (tokens, width), whose tiles hold every fourth column.
///
/// Of tiles `j` and `j + 1` (`j` 0, then 2), those of 16 tokens, then those of the next 16, follow
/// each other; lane `w` of tile `j` is column `4 w + (j ^ 1)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn write_interleaved(
    tiles: &[Line; 8 * LINES],
    sums: &mut [f32],
    width: usize,
    column: usize,
) {
    let rows = sums.chunks_exact_mut(width).take(2 * TOKENS);
    for (token, row) in rows.enumerate() {
        let (half, line) = (token / TOKENS, token % TOKENS);
        let tile = |j: usize| load(&tiles[(j / 2 * 4 + 2 * half + j % 2) * LINES + line].0);
        let [v0, v1, v2, v3] = [tile(0), tile(1), tile(2), tile(3)];
        let (a, b) = (_mm512_unpacklo_epi32(v1, v0), _mm512_unpacklo_epi32(v3, v2));
        let (c, d) = (_mm512_unpackhi_epi32(v1, v0), _mm512_unpackhi_epi32(v3, v2));
        let lanes = transpose_lanes([
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]);
        let row = row[column..].as_chunks_mut::<16>().0;
        for (to, values) in row.iter_mut().zip(lanes) {
            store(to, values);
        }
    }
}
