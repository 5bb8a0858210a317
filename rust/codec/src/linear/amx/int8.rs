//! Sums of `x W^T` with both factors rounded to 8 bits.
//!
//! ```text
//! x[m][k]   ~ xs[m] * xq[m][k]                  xs = max |x[m]| / 127
//! W[n][k]   ~ ws[n][p] * wq[n][k]               p the part of 1024 columns that k lies in,
//!                                               ws = max |scale of its blocks| * max |code| / 127
//! sums      = xs[m] * sum over p of ws[n][p] * (sum over the part of xq wq)
//! ```
//!
//! The inner sums are exact integers. Rows of int8 codes have one scale, so their codes stay as
//! they are; 4-bit codes are looked up in a table that is scaled and rounded once a block.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::error::CodecError;
use crate::linear::amx::decode::{store_apart, ByteDecoder, Rows, CHUNK, CHUNK_BYTES};
use crate::linear::amx::forward::{Nibbles, FEW, PAIR};
use crate::linear::amx::tiles::{Tiles, LINES, TOKENS};
use crate::linear::amx::transpose::{transpose, write_transposed};
use crate::linear::amx::work;
use crate::linear::epilogue::Epilogue;
use crate::linear::forward::widened;
use crate::linear::scratch::{Line, Scratch};
use crate::linear::strips;
use crate::linear::weight::{Codes, Weight};
use crate::parallel;
use crate::simd::{Bodies, Engine};
use crate::values::{Element, Values, ValuesMut};
use crate::x86::avx512::{load, load_f32, store};
use crate::x86::prefetch_l2;

/// Columns with one scale in each row of W, in chunks.
const PART: usize = 8;
/// Tiles of a chunk.
const TILES: usize = 2;

/// Writes `y = x W^T` with what `epilogue` adds.
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The tiles must have been granted.
pub(crate) unsafe fn forward<T: Element>(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let tokens = y.len() / weight.rows;
    let nibbles = Nibbles::of(weight);
    let x = Packed::new(engine, x, weight.cols, nibbles.is_some())?;
    let width = match (tokens > FEW, weight.rows) {
        (true, 4096..) => 256,
        (true, 1024..) => 128,
        _ => 64,
    };
    let work = work(weight, tokens);
    let jobs = strips::split(y, weight.rows, width).into_iter();
    parallel::for_each(work, engine, jobs, |strip| {
        let rows = strip.columns.clone();
        let (epilogue, mut to) = (epilogue.of(rows.clone()), strip.rows.into_iter());
        let mut finish = |first, sums: &mut [f32]| {
            epilogue.finish(first, to.by_ref().take(FEW), sums);
        };
        let source = Source { bodies: engine.bodies, weight, nibbles: nibbles.as_ref(), rows };
        // SAFETY: the caller vouches for the tiles; all such processors have the vectors.
        unsafe { strip_sums(&source, &x, tokens, &mut finish) };
    })
}

/// Tokens as bytes in right-hand tiles: for each 16, for each chunk of 128 columns, two tiles.
struct Packed {
    tiles: Scratch<Line>,
    /// What the bytes of a token are multiplied by.
    scales: Scratch<f32>,
    chunks: usize,
}

impl Packed {
    fn new(engine: Engine, x: Values<'_>, cols: usize, nibbles: bool) -> Result<Self, CodecError> {
        let tokens = x.len() / cols;
        let chunks = cols.div_ceil(CHUNK);
        let groups = tokens.div_ceil(2 * TOKENS) * 2;
        let lines = chunks * TILES * LINES;
        let mut tiles = Scratch::<Line>::new(groups * lines);
        let mut scales = Scratch::<f32>::new(groups * TOKENS);
        let jobs = tiles.chunks_mut(lines).zip(scales.chunks_mut(TOKENS)).enumerate();
        parallel::for_each(x.len(), engine, jobs, |(group, (tiles, scales))| {
            let first = (group * TOKENS).min(tokens) * cols;
            let last = ((group + 1) * TOKENS).min(tokens) * cols;
            let floats = widened(engine.bodies, x.split_at(last).0.split_at(first).1);
            // SAFETY: the caller found the tiles, and all such processors have the vectors.
            unsafe { pack_group(floats.chunks(cols), nibbles, tiles, scales) };
        })?;
        Ok(Self { tiles, scales, chunks })
    }

    fn group(&self, group: usize) -> &[Line] {
        let lines = self.chunks * TILES * LINES;
        &self.tiles[group * lines..(group + 1) * lines]
    }
}

/// Rounds and packs up to 16 rows; the tokens after them are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_group<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    nibbles_first: bool,
    tiles: &mut [Line],
    scales: &mut [f32],
) {
    let mut all = [&[][..]; TOKENS];
    all.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
    let mut factors = [0.0; TOKENS];
    for ((row, scale), factor) in all.iter().zip(scales).zip(&mut factors) {
        // NaN is the largest magnitude as an integer, and makes the token's sums NaN.
        let largest = row.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        let largest = f32::from_bits(largest);
        *scale = largest / 127.0;
        *factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    }
    // Of 8 bytes, the odd ones, which are tile 0's, then the even ones.
    let nibbles =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    for (chunk, tiles) in tiles.chunks_exact_mut(TILES * LINES).enumerate() {
        let mut vectors = [[_mm512_setzero_si512(); TOKENS]; 2];
        for (token, (row, factor)) in all.iter().zip(factors).enumerate() {
            let rest = row.get(chunk * CHUNK..).unwrap_or_default();
            let bytes = to_bytes(&rest[..rest.len().min(CHUNK)], factor);
            let [a, b] = bytes.as_chunks::<64>().0 else { unreachable!("128 bytes") };
            let [a, b] = [load(a), load(b)];
            (vectors[0][token], vectors[1][token]) = match nibbles_first {
                true => (_mm512_shuffle_epi8(a, nibbles), _mm512_shuffle_epi8(b, nibbles)),
                false => (a, b),
            };
        }
        // Lane i of each vector is four bytes of its token; together they are a line.
        for (part, vectors) in vectors.iter().enumerate() {
            for (i, line) in transpose(vectors).into_iter().enumerate() {
                let at =
                    if nibbles_first { i % 2 * LINES + 8 * part + i / 2 } else { part * LINES + i };
                store(&mut tiles[at].0, line);
            }
        }
    }
}

/// Up to 128 values times `factor`, rounded to bytes with signs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn to_bytes(values: &[f32], factor: f32) -> [u8; CHUNK] {
    let mut room = [0.0; CHUNK];
    room[..values.len()].copy_from_slice(values);
    let mut bytes = [0; CHUNK];
    let factor = _mm512_set1_ps(factor);
    for (to, from) in bytes.as_chunks_mut::<16>().0.iter_mut().zip(room.as_chunks().0) {
        let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_f32(from), factor));
        let narrow = _mm512_cvtsepi32_epi8(rounded);
        // SAFETY: the array is 16 bytes long; the store takes any alignment.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), narrow) };
    }
    bytes
}

/// The rows of W of one strip.
struct Source<'a> {
    bodies: &'static Bodies,
    weight: &'a Weight<'a>,
    nibbles: Option<&'a Nibbles<'a>>,
    rows: Range<usize>,
}

/// What the bytes of a strip stand for.
struct Scaled {
    /// For each row and part: what its bytes are multiplied by.
    steps: Vec<f32>,
    /// For each row and 64 columns: what the codes of a block are multiplied by to give bytes.
    factors: Scratch<f32>,
    parts: usize,
}

impl Source<'_> {
    /// Scales of parts, from those of blocks.
    fn scaled(&self, chunks: usize) -> Scaled {
        let parts = chunks.div_ceil(PART);
        let mut steps = vec![0.0; self.rows.len() * parts];
        if let Some(nibbles) = self.nibbles {
            let largest = nibbles.table.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
            let mut factors = nibbles.scales(self.rows.clone(), chunks);
            for (steps, row) in steps.chunks_mut(parts).zip(factors.chunks_mut(2 * chunks)) {
                for (step, scales) in steps.iter_mut().zip(row.chunks_mut(2 * PART)) {
                    *step = magnitude(scales) * largest / 127.0;
                    let inverse = if *step > 0.0 { 1.0 / *step } else { 0.0 };
                    scales.iter_mut().for_each(|scale| *scale *= inverse);
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
                scales.write(blocks.start, &mut room);
                *step = magnitude(&room) * largest / 127.0;
            }
        }
        Scaled { steps, factors: Scratch::new(0), parts }
    }

    /// Writes a part of all rows as left-hand tiles: for each 32 rows, for each chunk, twice two.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn decode(&self, scaled: &Scaled, all: usize, chunks: Range<usize>, panel: &mut [Line]) {
        let lines_per_pair = chunks.len() * 2 * TILES * LINES;
        if let Some(nibbles) = self.nibbles {
            let decoder = ByteDecoder::new(nibbles.table);
            let bytes_per_row = self.weight.cols / 2;
            let rows = Rows {
                codes: &nibbles.packed[self.rows.start * bytes_per_row..],
                bytes_per_row,
                numbers: &scaled.factors,
                chunks: all,
                count: self.rows.len(),
            };
            // Low strips stay in L2 whole: the next one is fetched. Of others, the next rows.
            let low = self.rows.len() <= 2 * PAIR;
            let mut next = self.rows.len() * (bytes_per_row + chunks.start * CHUNK_BYTES);
            for (pair, panel) in panel.chunks_exact_mut(lines_per_pair).enumerate() {
                let steps = panel.chunks_exact_mut(2 * TILES * LINES);
                for (chunk, to) in chunks.clone().zip(steps) {
                    let at = (pair + 1) * PAIR * bytes_per_row + chunk * CHUNK_BYTES;
                    rows.for_each(pair * PAIR..(pair + 1) * PAIR, chunk, |i, row, factors| {
                        prefetch_l2(rows.codes, if low { next } else { at + i * bytes_per_row });
                        next += CHUNK_BYTES;
                        store_apart(&mut to[i..], PAIR, decoder.row(row, factors));
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
                    to[tile * PAIR + row % PAIR] = Line(*bytes);
                }
            }
        }
    }
}

/// The largest magnitude; NaN if there is one.
fn magnitude(scales: &[f32]) -> f32 {
    f32::from_bits(scales.iter().map(|scale| scale.abs().to_bits()).max().unwrap_or(0))
}

/// Sums of a strip; `finish` takes the first token and the sums of each 32 tokens, (tokens, rows).
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn strip_sums(
    source: &Source<'_>,
    x: &Packed,
    tokens: usize,
    finish: &mut dyn FnMut(usize, &mut [f32]),
) {
    let rows = source.rows.len();
    let (pairs, groups) = (rows.div_ceil(PAIR), tokens.div_ceil(FEW));
    let scaled = source.scaled(x.chunks);
    let mut panel = Scratch::<Line>::new(pairs * PART.min(x.chunks) * 2 * TILES * LINES);
    let mut partial = Scratch::<Line>::new(pairs * groups * 4 * LINES);
    let mut sums = Scratch::<f32>::new(FEW * rows);
    let mut found = [Line([0; 64]); 4 * LINES];
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    for part in 0..scaled.parts {
        let chunks = part * PART..((part + 1) * PART).min(x.chunks);
        let lines_per_pair = chunks.len() * 2 * TILES * LINES;
        let panel = &mut panel[..pairs * lines_per_pair];
        source.decode(&scaled, x.chunks, chunks.clone(), panel);
        for group in 0..groups {
            let columns = chunks.start * TILES * LINES..chunks.end * TILES * LINES;
            let [b0, b1] = [0, 1].map(|i| &x.group(2 * group + i)[columns.clone()]);
            let partial = &mut partial[group * pairs * 4 * LINES..][..pairs * 4 * LINES];
            let kept = partial.as_chunks_mut::<{ 4 * LINES }>().0.iter_mut();
            for ((pair, panel), kept) in panel.chunks_exact(lines_per_pair).enumerate().zip(kept) {
                tiles.zero();
                let steps = panel.as_chunks::<{ 2 * LINES }>().0.iter();
                let right = b0.as_chunks::<LINES>().0.iter().zip(b1.as_chunks::<LINES>().0);
                for (a, (b0, b1)) in steps.zip(right) {
                    tiles.multiply_int8_2x2(a, b0, b1);
                }
                tiles.store(&mut found);
                let steps = scaled.steps.chunks_exact(scaled.parts).map(|steps| steps[part]);
                let mut factors = [0.0; PAIR];
                factors.iter_mut().zip(steps.skip(pair * PAIR)).for_each(|(to, step)| *to = step);
                accumulate(&found, &factors, part == 0, kept);
            }
            if part + 1 == scaled.parts {
                let here = (tokens - group * FEW).min(FEW);
                let sums = &mut sums[..here * rows];
                write(partial, &x.scales[group * FEW..][..FEW], rows, sums);
                finish(group * FEW, sums);
            }
        }
    }
}

/// Adds integers, times the factor of their row of W, to what was found before.
#[inline]
#[target_feature(enable = "avx512f")]
fn accumulate(
    found: &[Line; 4 * LINES],
    factors: &[f32; PAIR],
    first: bool,
    kept: &mut [Line; 4 * LINES],
) {
    for (i, (found, kept)) in found.iter().zip(kept).enumerate() {
        // Accumulators 0 and 1 are of the first 16 rows.
        let factor = _mm512_set1_ps(factors[i / (2 * LINES) * LINES + i % LINES]);
        let found = _mm512_cvtepi32_ps(load(&found.0));
        let before = if first { _mm512_setzero_si512() } else { load(&kept.0) };
        let sum = _mm512_fmadd_ps(found, factor, _mm512_castsi512_ps(before));
        store(&mut kept.0, _mm512_castps_si512(sum));
    }
}

/// Writes the sums of up to 32 tokens, times the scales of these, (tokens, rows).
#[inline]
#[target_feature(enable = "avx512f")]
fn write(partial: &[Line], scales: &[f32], rows: usize, sums: &mut [f32]) {
    let scales = scales.as_chunks::<TOKENS>().0;
    for (at, tile) in partial.as_chunks::<LINES>().0.iter().enumerate() {
        let (pair, i) = (at / 4, at % 4);
        let (column, token) = (pair * PAIR + i / 2 * LINES, i % 2 * TOKENS);
        if column < rows && token < sums.len() / rows {
            let scales = load_f32(&scales[i % 2]);
            let mut scaled = *tile;
            for line in &mut scaled {
                let product = _mm512_mul_ps(_mm512_castsi512_ps(load(&line.0)), scales);
                store(&mut line.0, _mm512_castps_si512(product));
            }
            write_transposed(&scaled, sums, rows, token, column);
        }
    }
}
