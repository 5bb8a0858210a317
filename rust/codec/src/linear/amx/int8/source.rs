//! Rows of W rounded to bytes, as left-hand tiles.

use std::ops::Range;

use crate::linear::amx::decode::{ByteDecoder, Rows, TileRows, CHUNK, CHUNK_BYTES};
use crate::linear::amx::forward::PAIR;
use crate::linear::amx::int8::pack::to_bytes;
use crate::linear::amx::int8::{PART, TILES};
use crate::linear::amx::nibbles::Nibbles;
use crate::linear::amx::tiles::LINES;
use crate::linear::matvec::scales_avx512::write_scales;
use crate::linear::weight::{Codes, Weight};
use crate::scratch::{Line, Scratch};
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

/// What the bytes of a strip stand for.
pub(super) struct Scaled {
    /// For each row and part: what its bytes are multiplied by.
    pub(super) steps: Vec<f32>,
    /// For each row and 64 columns: what the codes of a block are multiplied by to give bytes.
    pub(super) factors: Scratch<f32>,
    pub(super) parts: usize,
}

impl Scaled {
    /// Of a row; of rows after the last, any number.
    #[inline(always)]
    pub(super) fn step(&self, row: usize, part: usize) -> f32 {
        self.steps.get(row * self.parts + part).copied().unwrap_or(0.0)
    }
}

impl Source<'_> {
    /// Scales of parts, from those of blocks.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn scaled(&self, chunks: usize) -> Scaled {
        let parts = chunks.div_ceil(PART);
        let mut steps = vec![0.0; self.rows.len() * parts];
        if let Some(nibbles) = self.nibbles {
            let largest = nibbles.table.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
            let mut factors = nibbles.scales(self.rows.clone(), chunks);
            for (steps, row) in steps.chunks_mut(parts).zip(factors.chunks_mut(2 * chunks)) {
                for (step, scales) in steps.iter_mut().zip(row.chunks_mut(2 * PART)) {
                    *step = magnitude(scales) * largest / 127.0;
                    let inverse = if *step > 0.0 { 1.0 / *step } else { 0.0 };
                    for scale in scales {
                        *scale *= inverse;
                    }
                }
            }
            return Scaled { steps, factors, parts };
        }
        let Weight { cols, blocksize, scales, codes, .. } = *self.weight;
        let largest = match codes {
            Codes::FourBit { table, .. } => table.iter().fold(0.0_f32, |a, v| a.max(v.abs())),
            Codes::Int8(_) => 1.0,
        };
        let mut room = Vec::new();
        for (row, steps) in self.rows.clone().zip(steps.chunks_mut(parts)) {
            for (part, step) in steps.iter_mut().enumerate() {
                let first = row * cols + part * PART * CHUNK;
                let last = (first + PART * CHUNK).min((row + 1) * cols);
                let blocks = first / blocksize..last.div_ceil(blocksize);
                room.resize(blocks.len(), 0.0);
                write_scales(&scales, blocks.start, &mut room);
                *step = magnitude(&room) * largest / 127.0;
            }
        }
        Scaled { steps, factors: Scratch::new(0), parts }
    }

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
            let step = scaled.steps[row * scaled.parts + part];
            let factor = if step > 0.0 { 1.0 / step } else { 0.0 };
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

/// The largest magnitude; NaN if there is one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn magnitude(scales: &[f32]) -> f32 {
    f32::from_bits(scales.iter().map(|scale| scale.abs().to_bits()).max().unwrap_or(0))
}
