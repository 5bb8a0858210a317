//! 4-bit codes to tiles of bfloat16.
//!
//! A chunk is 128 codes of a row, 64 bytes. Nibble `j` of its 16-bit word `w` is value
//! `4 w + (j ^ 1)`, so a shift, a mask and one `vpermw` give 32 values of every fourth column: four
//! tiles a chunk, in an order of columns that the other factor is packed in, too.
//!
//! Two blocks of 64 in a chunk have a table each, in one register: the fifth bit of the index
//! chooses.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::scratch::Line;
use crate::x86::avx2;
use crate::x86::avx512::{load, load_f32, scaled_bf16, store};

/// Columns that are decoded together.
pub(crate) const CHUNK: usize = 128;
/// Bytes of a chunk's codes.
pub(crate) const CHUNK_BYTES: usize = CHUNK / 2;
/// Tiles of 16 rows of a chunk.
pub(crate) const TILES_PER_CHUNK: usize = 4;

/// What turns the codes of a weight into values.
#[derive(Clone, Copy)]
pub(crate) struct Decoder {
    table: __m512,
    /// Bit 4 of the indices of the second block.
    second: __m512i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) fn new(table: &[f32; 16]) -> Self {
        let second = _mm512_maskz_set1_epi16(0xffff_0000, 16);
        Self { table: load_f32(table), second }
    }

    /// A row of each of the four tiles of a chunk.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn row(&self, codes: &[u8; CHUNK_BYTES], scales: &[f32; 2]) -> [__m512i; 4] {
        let table = scaled_bf16(self.table, scales);
        let nibble = _mm512_set1_epi16(15);
        let bytes = load(codes);
        let values = |shifted| {
            // (shifted & nibble) | second
            let index = _mm512_ternarylogic_epi32::<0xea>(shifted, nibble, self.second);
            _mm512_permutexvar_epi16(index, table)
        };
        [
            values(bytes),
            values(_mm512_srli_epi16::<4>(bytes)),
            values(_mm512_srli_epi16::<8>(bytes)),
            values(_mm512_srli_epi16::<12>(bytes)),
        ]
    }
}

/// Codes of some rows of a weight with two numbers for each chunk of each row.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// From the first row on, to the end of the weight.
    pub(crate) codes: &'a [u8],
    pub(crate) bytes_per_row: usize,
    /// (rows, chunks, 2).
    pub(crate) numbers: &'a [f32],
    pub(crate) chunks: usize,
    /// How many.
    pub(crate) count: usize,
}

impl Rows<'_> {
    /// Calls `decode` with the place of each row among `rows`, which is less than their number, its
    /// codes in a chunk and its numbers.
    ///
    /// Codes after the end of a row are those of the next, or zeros: their numbers are zeros.
    #[inline(always)]
    pub(crate) fn for_each(
        &self,
        rows: Range<usize>,
        chunk: usize,
        mut decode: impl FnMut(usize, &[u8; CHUNK_BYTES], &[f32; 2]),
    ) {
        let rows = rows.start..rows.end.min(self.count);
        if rows.is_empty() {
            return;
        }
        let stride = self.bytes_per_row;
        let codes = &self.codes[rows.start * stride + chunk * CHUNK_BYTES..];
        let numbers = &self.numbers[(rows.start * self.chunks + chunk) * 2..];
        let fits = (rows.len() - 1) * 2 * self.chunks + 2 <= numbers.len();
        assert!(fits, "there are two numbers for each chunk of each row");
        // SAFETY: the last row has its numbers, as was checked, and so have those before it.
        let numbers = |i| unsafe { array_at(numbers, i * 2 * self.chunks) };
        if (rows.len() - 1) * stride + CHUNK_BYTES <= codes.len() {
            for i in 0..rows.len() {
                // SAFETY: the last row has a chunk, as was checked, and so have those before it.
                decode(i, unsafe { array_at(codes, i * stride) }, numbers(i));
            }
            return;
        }
        // At the end of the weight a chunk is cut short.
        for i in 0..rows.len() {
            let mut room = [0; CHUNK_BYTES];
            let rest = &codes[i * stride..];
            let len = rest.len().min(CHUNK_BYTES);
            room[..len].copy_from_slice(&rest[..len]);
            decode(i, &room, numbers(i));
        }
    }
}

/// `N` values from `at` on. The loops over rows have no time for checks.
///
/// # Safety
/// `at + N` must not be more than the length.
#[inline(always)]
unsafe fn array_at<T, const N: usize>(values: &[T], at: usize) -> &[T; N] {
    debug_assert!(at + N <= values.len());
    // SAFETY: the caller vouches for `at`.
    let first = unsafe { values.as_ptr().add(at) };
    // SAFETY: so many values follow; an array has their layout.
    unsafe { &*first.cast() }
}

/// Rows of `N` tiles to be written: a line of each tile side by side, rows `step` lines apart.
pub(crate) struct TileRows<'a, const N: usize> {
    lines: &'a mut [Line],
    step: usize,
    count: usize,
}

impl<'a, const N: usize> TileRows<'a, N> {
    /// `count` rows, at least one, the first at the start of `lines`.
    #[inline(always)]
    pub(crate) fn new(lines: &'a mut [Line], step: usize, count: usize) -> Self {
        assert!((count - 1) * step + N <= lines.len(), "all rows must be among the lines");
        Self { lines, step, count }
    }

    /// Writes row `i` of each tile.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn write(&mut self, i: usize, row: [__m512i; N]) {
        assert!(i < self.count);
        for (tile, values) in row.into_iter().enumerate() {
            // SAFETY: `new` checked that the last row is inside of the slice.
            let to = unsafe { self.lines.get_unchecked_mut(i * self.step + tile) };
            store(&mut to.0, values);
        }
    }
}

/// What turns the codes of two rows into values that stand in pairs.
#[derive(Clone, Copy)]
pub(crate) struct PairDecoder {
    table: __m512,
}

impl PairDecoder {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn new(table: &[f32; 16]) -> Self {
        Self { table: load_f32(table) }
    }

    /// A line of each of four tiles: the values of 64 columns of two rows, in pairs. Lane `w` of
    /// tile `j` is column `4 w + (j ^ 1)`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn rows(
        &self,
        first: &[u8; 32],
        second: &[u8; 32],
        scales: [f32; 2],
    ) -> [__m512i; 4] {
        let table = scaled_bf16(self.table, &scales);
        let nibbles = _mm512_set1_epi32(0x000f_000f);
        let odd = _mm512_set1_epi32(0x0010_0000);
        let [first, second] = [first, second].map(|c| _mm512_cvtepu16_epi32(avx2::load(c)));
        let words = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
        let values = |shifted| {
            // (shifted & nibbles) | odd
            let index = _mm512_ternarylogic_epi32::<0xea>(shifted, nibbles, odd);
            _mm512_permutexvar_epi16(index, table)
        };
        [
            values(words),
            values(_mm512_srli_epi16::<4>(words)),
            values(_mm512_srli_epi16::<8>(words)),
            values(_mm512_srli_epi16::<12>(words)),
        ]
    }
}

/// What turns the codes of a weight into bytes with signs.
#[derive(Clone, Copy)]
pub(crate) struct ByteDecoder {
    table: __m512,
}

impl ByteDecoder {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(crate) fn new(table: &[f32; 16]) -> Self {
        Self { table: load_f32(table) }
    }

    /// A row of each of the two tiles of a chunk: the odd values, the even ones.
    ///
    /// Values are the table's times `factors`, those of the two blocks, rounded to the nearest of
    /// -127..=127.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) fn row(&self, codes: &[u8; CHUNK_BYTES], factors: &[f32; 2]) -> [__m512i; 2] {
        let [low, high] = factors.map(|factor| {
            let values = _mm512_mul_ps(self.table, _mm512_set1_ps(factor));
            _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values))
        });
        let both = _mm512_castsi256_si512(_mm256_broadcastsi128_si256(low));
        let table = _mm512_inserti64x4::<1>(both, _mm256_broadcastsi128_si256(high));
        let nibble = _mm512_set1_epi8(15);
        let bytes = load(codes);
        let odd = _mm512_and_si512(bytes, nibble);
        let even = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
        [_mm512_shuffle_epi8(table, odd), _mm512_shuffle_epi8(table, even)]
    }
}
