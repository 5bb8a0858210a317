//! 4-bit codes to pairs of bfloat16, in the order of the columns.
//!
//! `vpmovzxwq` gives each 64 bits of a vector two bytes of codes, `vpmultishiftqb` moves their four
//! nibbles to where `vpermw` takes its indices from. Subnormal values become zero, as they are in
//! products of pairs.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::linear::dense::terms::Pair;
use crate::linear::matvec::scales_avx512::write_scales;
use crate::linear::weight::{Codes, Weight};
use crate::scales::Scales;
use crate::scratch::Scratch;
use crate::x86::avx2;
use crate::x86::avx512::{load, load_f32, scaled_bf16, store};
use crate::x86::{prefetch, prefetch_l2};

/// Columns that share a scale, at least.
const BLOCK: usize = 64;
/// Pairs of a vector.
const LANES: usize = 16;
/// How many rows ahead codes are fetched, into the first- and the second-level cache. The rows of a
/// weight lie at distances that few sets of a cache share: the first level holds no more of them.
const ROWS_AHEAD: [usize; 2] = [8, 64];

/// Writes a piece of a weight as (rows, pairs of columns).
///
/// For [`Weight::chunks_have_scales`], and columns that begin and end with blocks of 64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
pub(crate) fn along(
    weight: &Weight<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    panel: &mut [Pair],
) {
    /// Where the code of each 16-bit lane starts in the 16 bits of its four codes, in the lower byte.
    const SHIFTS: [u8; 64] = shifts([4, 0, 12, 8]);
    let Codes::FourBit { packed, table } = weight.codes else { return };
    let (table, shifts) = (load_f32(table), load(&SHIFTS));
    let mut scales = Blocks::new(weight, &columns);
    let ahead = ROWS_AHEAD[0] * weight.cols / 2;
    for (row, panel) in rows.zip(panel.chunks_exact_mut(columns.len() / 2)) {
        scales.load(weight, row, &columns);
        let codes = codes_of(packed, weight.cols, row, &columns);
        let (chunks, rest) = codes.as_chunks::<2>();
        let (vectors, _) = panel.as_chunks_mut::<LANES>();
        let (of_chunks, of_rest) = vectors.split_at_mut(4 * chunks.len());
        let decode = |codes: &[u8; 16], table| {
            let words = _mm512_cvtepu16_epi64(avx2::load_half(codes));
            // vpermw takes 5 bits, of which the fifth is the next code's: the table is there twice.
            _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, words), table)
        };
        for (i, (codes, to)) in chunks.iter().zip(of_chunks.as_chunks_mut::<4>().0).enumerate() {
            prefetch_l2(codes, ahead);
            let both = scaled_bf16(table, &[scales.of(2 * i), scales.of(2 * i + 1)]);
            let tables = [
                _mm512_shuffle_i64x2::<0x44>(both, both),
                _mm512_shuffle_i64x2::<0xee>(both, both),
            ];
            let codes = codes.as_flattened().as_chunks().0;
            for (q, (codes, to)) in codes.iter().zip(to).enumerate() {
                store(to, decode(codes, tables[q / 2]));
            }
        }
        let both = scaled_bf16(table, &[scales.of(2 * chunks.len()); 2]);
        for (codes, to) in rest.as_flattened().as_chunks().0.iter().zip(of_rest) {
            store(to, decode(codes, both));
        }
    }
}

/// Writes a piece of a weight as slivers of 32 columns, each (pairs of rows, columns); after an odd
/// number of rows come zeros.
///
/// For weights and columns as [`along`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
pub(crate) fn down(
    weight: &Weight<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    panel: &mut [Pair],
) {
    /// The same where bytes of two rows lie side by side.
    const SHIFTS: [u8; 64] = shifts([4, 12, 0, 8]);
    let Codes::FourBit { packed, table } = weight.codes else { return };
    let (table, shifts) = (load_f32(table), load(&SHIFTS));
    let (nibbles, odd) = (_mm512_set1_epi16(15), _mm512_set1_epi32(0x0010_0000));
    let mut scales = [Blocks::new(weight, &columns), Blocks::new(weight, &columns)];
    let height = rows.len().div_ceil(2);
    let [near, far] = ROWS_AHEAD.map(|rows| rows * weight.cols / 2);
    let (vectors, _) = panel.as_chunks_mut::<LANES>();
    for (pair, row) in rows.clone().step_by(2).enumerate() {
        let two = row + 1 < rows.end;
        let codes = [
            codes_of(packed, weight.cols, row, &columns),
            codes_of(packed, weight.cols, row + usize::from(two), &columns),
        ];
        scales[0].load(weight, row, &columns);
        if two {
            scales[1].load(weight, row + 1, &columns);
        } else {
            scales[1].found.fill(0.0);
        }
        for (i, codes) in codes[0].iter().zip(codes[1]).enumerate() {
            // The next rows of these columns, which no hardware foresees.
            prefetch(codes.0, near);
            prefetch(codes.1, near);
            prefetch_l2(codes.0, far);
            prefetch_l2(codes.1, far);
            let table = scaled_bf16(table, &[scales[0].of(i), scales[1].of(i)]);
            let (first, second) = (avx2::load(codes.0), avx2::load(codes.1));
            let low = _mm256_unpacklo_epi8(first, second);
            let high = _mm256_unpackhi_epi8(first, second);
            let words = [
                _mm256_castsi256_si128(low),
                _mm256_castsi256_si128(high),
                _mm256_extracti128_si256::<1>(low),
                _mm256_extracti128_si256::<1>(high),
            ];
            for (quarter, words) in words.into_iter().enumerate() {
                let codes = _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(words));
                // (codes & nibbles) | odd
                let index = _mm512_ternarylogic_epi32::<0xea>(codes, nibbles, odd);
                let sliver = 2 * i + quarter / 2;
                let to = &mut vectors[(sliver * height + pair) * 2 + quarter % 2];
                store(to, _mm512_permutexvar_epi16(index, table));
            }
        }
    }
}

/// The codes of a piece of a row, by blocks.
#[inline(always)]
fn codes_of<'a>(
    packed: &'a [u8],
    cols: usize,
    row: usize,
    columns: &Range<usize>,
) -> &'a [[u8; BLOCK / 2]] {
    let first = (row * cols + columns.start) / 2;
    packed[first..first + columns.len() / 2].as_chunks().0
}

/// For each 16-bit lane its shift in the lower byte.
const fn shifts(of_four: [u8; 4]) -> [u8; 64] {
    let mut shifts = [0; 64];
    let mut lane = 0;
    while lane < 32 {
        shifts[2 * lane] = of_four[lane % 4];
        lane += 1;
    }
    shifts
}

/// The scales of a piece of a row.
struct Blocks {
    found: Scratch<f32>,
    /// Blocks of 64 columns before the piece, in the block that it begins in.
    before: usize,
    /// Blocks are of 64 values, shifted by this.
    shift: u32,
}

impl Blocks {
    fn new(weight: &Weight<'_>, columns: &Range<usize>) -> Self {
        let shift = (weight.blocksize / BLOCK).ilog2();
        let before = columns.start % weight.blocksize / BLOCK;
        let count = (before + columns.len() / BLOCK).div_ceil(1 << shift);
        Self { found: Scratch::new(count + 1), before, shift }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load(&mut self, weight: &Weight<'_>, row: usize, columns: &Range<usize>) {
        let first = (row * weight.cols + columns.start) / weight.blocksize;
        let count = self.found.len() - 1;
        let (found, behind) = self.found.split_at_mut(count);
        match weight.scales {
            Scales::Plain(scales) => found.copy_from_slice(&scales[first..first + count]),
            Scales::Nested { .. } => write_scales(&weight.scales, first, found),
        }
        behind.fill(0.0);
    }

    /// The scale of 64 columns; behind the last ones, any.
    #[inline(always)]
    fn of(&self, block: usize) -> f32 {
        self.found[((self.before + block) >> self.shift).min(self.found.len() - 1)]
    }
}
