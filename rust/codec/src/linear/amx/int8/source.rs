//! Rows of W rounded to bytes, as left-hand tiles.

use std::ops::Range;

use crate::linear::amx::forward::PAIR;
use crate::linear::amx::int8::TILES;
use crate::linear::amx::tiles::LINES;
use crate::linear::avx512::bytes::{inverse, to_bytes, Scaled, PART};
use crate::linear::avx512::decode::{ByteDecoder, Rows, TileRows, CHUNK, CHUNK_BYTES};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::weight::Weight;
use crate::scratch::Line;
use crate::simd::Bodies;
use crate::values::ValuesMut;
use crate::x86::prefetch_l2;

/// The rows of W of one strip.
pub(super) struct Source<'a> {
    pub(super) bodies: &'static Bodies,
    pub(super) weight: &'a Weight<'a>,
    pub(super) nibbles: Option<&'a Nibbles<'a>>,
    pub(super) rows: Range<usize>,
}

impl Source<'_> {
    /// The codes of the rows, with the factors of their chunks.
    #[inline(always)]
    pub(super) fn codes<'a>(
        &self,
        nibbles: &Nibbles<'a>,
        scaled: &'a Scaled,
        chunks: usize,
    ) -> Rows<'a> {
        let bytes_per_row = self.weight.cols / 2;
        Rows {
            codes: &nibbles.packed[self.rows.start * bytes_per_row..],
            bytes_per_row,
            numbers: &scaled.factors,
            chunks,
            count: self.rows.len(),
        }
    }

    /// Writes a part of all rows as left-hand tiles: for each 32 rows, for each chunk, for each row its
    /// lines of two tiles.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn decode(
        &self,
        scaled: &Scaled,
        all: usize,
        chunks: Range<usize>,
        panel: &mut [Line],
    ) {
        let lines_per_pair = chunks.len() * 2 * TILES * LINES;
        if let Some(nibbles) = self.nibbles {
            let decoder = ByteDecoder::new(nibbles.table);
            let rows = self.codes(nibbles, scaled, all);
            let bytes_per_row = rows.bytes_per_row;
            // Low strips stay in L2 whole: the next one is fetched. Of others, the next rows.
            let low = self.rows.len() <= 2 * PAIR;
            let mut next = self.rows.len() * (bytes_per_row + chunks.start * CHUNK_BYTES);
            for (pair, panel) in panel.chunks_exact_mut(lines_per_pair).enumerate() {
                let steps = panel.chunks_exact_mut(2 * TILES * LINES);
                for (chunk, to) in chunks.clone().zip(steps) {
                    let at = (pair + 1) * PAIR * bytes_per_row + chunk * CHUNK_BYTES;
                    let mut to = TileRows::new(to, TILES, PAIR);
                    rows.for_each(pair * PAIR..(pair + 1) * PAIR, chunk, |i, row, factors| {
                        prefetch_l2(rows.codes, if low { next } else { at + i * bytes_per_row });
                        next += CHUNK_BYTES;
                        to.write(i, decoder.row(row, factors));
                    });
                }
            }
            return;
        }
        let cols = self.weight.cols;
        let columns = chunks.start * CHUNK..(chunks.end * CHUNK).min(cols);
        let part = chunks.start / PART;
        let mut values = vec![0.0; cols];
        for row in 0..self.rows.len() {
            let at = self.rows.start + row;
            let out = ValuesMut::F32(&mut values);
            self.weight.dequantize_rows(self.bodies, at..at + 1, out);
            let factor = inverse(scaled.step(row, part));
            let panel = &mut panel[row / PAIR * lines_per_pair..][..lines_per_pair];
            let to = panel.chunks_exact_mut(2 * TILES * LINES);
            for (values, to) in values[columns.clone()].chunks(CHUNK).zip(to) {
                let bytes = to_bytes(values, factor);
                for (tile, bytes) in bytes.as_chunks::<64>().0.iter().enumerate() {
                    to[row % PAIR * TILES + tile] = Line(*bytes);
                }
            }
        }
    }
}
