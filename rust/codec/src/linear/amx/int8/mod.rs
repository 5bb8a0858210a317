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

mod pack;
mod source;

use std::arch::x86_64::*;

use crate::error::CodecError;
use crate::linear::amx::forward::{width, FEW, PAIR};
use crate::linear::amx::int8::pack::Packed;
use crate::linear::amx::int8::source::Source;
use crate::linear::amx::tiles::{Stack, Tiles, LINES, TOKENS};
use crate::linear::amx::transpose::write_transposed;
use crate::linear::amx::work;
use crate::linear::avx512::bytes::{Scaled, PART};
use crate::linear::avx512::decode::{ByteDecoder, TileRows, CHUNK_BYTES};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::epilogue::Epilogue;
use crate::linear::strips;
use crate::linear::weight::Weight;
use crate::parallel;
use crate::scratch::{Line, Scratch};
use crate::simd::Engine;
use crate::values::{Element, Values};
use crate::x86::avx512::{load, load_f32, store};
use crate::x86::prefetch_l2;

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
    let width = width(engine, weight.rows, tokens);
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

/// Sums of a strip; `finish` takes the first token and the sums of each 32 tokens, (tokens, rows).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn strip_sums(
    source: &Source<'_>,
    x: &Packed,
    tokens: usize,
    finish: &mut dyn FnMut(usize, &mut [f32]),
) {
    let rows = source.rows.len();
    let (pairs, groups) = (rows.div_ceil(PAIR), tokens.div_ceil(FEW));
    let scaled = Scaled::new(source.weight, source.nibbles, source.rows.clone());
    let mut sums = Scratch::<f32>::new(tokens.min(FEW) * rows);
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    if let (Some(nibbles), true) = (source.nibbles, tokens <= TOKENS) {
        few_tokens(&tiles, source, nibbles, &scaled, x, &mut sums);
        return finish(0, &mut sums);
    }
    let mut panel = Scratch::<Line>::new(pairs * PART.min(x.chunks) * 2 * TILES * LINES);
    let mut partial = Scratch::<Line>::new(pairs * groups * 4 * LINES);
    let mut found = [Line([0; 64]); 4 * LINES];
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
                let right = b0.as_chunks::<LINES>().0.iter().zip(b1.as_chunks::<LINES>().0);
                for (i, (b0, b1)) in right.enumerate() {
                    let a = Stack::new(&panel[i / TILES * TILES * PAIR + i % TILES..], TILES);
                    tiles.multiply_int8_2x2(a, [b0, b1].map(|b| Stack::dense(b)));
                }
                tiles.store(&mut found);
                // Accumulators 0 and 1 are of the first 16 rows.
                let row = |line: usize| pair * PAIR + line / (2 * LINES) * LINES + line % LINES;
                accumulate(&found, |line| scaled.step(row(line), part), part == 0, kept);
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

/// Decodes a chunk of 64 rows while the one before is multiplied with up to 16 tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn few_tokens(
    tiles: &Tiles,
    source: &Source<'_>,
    nibbles: &Nibbles<'_>,
    scaled: &Scaled,
    x: &Packed,
    sums: &mut [f32],
) {
    const HEIGHT: usize = 4 * LINES;
    /// Lines from row to row, as for bfloat16.
    const STEP: usize = 2 * TILES;
    let decoder = ByteDecoder::new(nibbles.table);
    let rows = source.codes(nibbles, scaled, x.chunks);
    let mut room = Scratch::<Line>::new(HEIGHT * STEP);
    let mut found = [Line([0; 64]); 4 * LINES];
    for first in (0..rows.count).step_by(HEIGHT) {
        let mut kept = [Line([0; 64]); 4 * LINES];
        // The codes of the next rows follow: they are fetched line by line.
        let mut ahead = (first + HEIGHT) * rows.bytes_per_row;
        for part in 0..scaled.parts {
            let chunks = part * PART..((part + 1) * PART).min(x.chunks);
            tiles.zero();
            for chunk in chunks.start..=chunks.end {
                let [next, ready] = [chunk, chunk + 1].map(|chunk| chunk % 2 * TILES);
                for quarter in 0..4 {
                    if chunk < chunks.end {
                        let row = quarter * LINES;
                        let mut to = TileRows::new(&mut room[row * STEP + next..], STEP, LINES);
                        let rows_of_w = first + row..first + row + LINES;
                        rows.for_each(rows_of_w, chunk, |i, row, factors| {
                            prefetch_l2(rows.codes, ahead);
                            ahead += CHUNK_BYTES;
                            to.write(i, decoder.row(row, factors));
                        });
                    }
                    let tile = quarter / 2;
                    if chunk > chunks.start && quarter % 2 == 1 {
                        let pairs = &x.group(0)[((chunk - 1) * TILES + tile) * LINES..];
                        let a = Stack::new(&room[ready + tile..], STEP);
                        tiles.multiply_int8_4x1(a, Stack::dense(pairs));
                    }
                }
            }
            tiles.store(&mut found);
            accumulate(&found, |line| scaled.step(first + line, part), part == 0, &mut kept);
        }
        let scales = load_f32(lines_of(&x.scales));
        for (i, tile) in kept.as_chunks_mut::<LINES>().0.iter_mut().enumerate() {
            let column = first + i * LINES;
            if column < rows.count {
                scale(tile, scales);
                write_transposed(tile, sums, rows.count, 0, column);
            }
        }
    }
}

/// The scales of the first 16 tokens.
fn lines_of(scales: &[f32]) -> &[f32; TOKENS] {
    scales.first_chunk().expect("scales come in sixteens")
}

/// Multiplies the columns of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale(tile: &mut [Line; LINES], scales: __m512) {
    for line in tile {
        let product = _mm512_mul_ps(_mm512_castsi512_ps(load(&line.0)), scales);
        store(&mut line.0, _mm512_castps_si512(product));
    }
}

/// Adds integers, times the factor of their line's row of W, to what was found before.
#[inline]
#[target_feature(enable = "avx512f")]
fn accumulate(
    found: &[Line; 4 * LINES],
    factor: impl Fn(usize) -> f32,
    first: bool,
    kept: &mut [Line; 4 * LINES],
) {
    for (i, (found, kept)) in found.iter().zip(kept).enumerate() {
        let factor = _mm512_set1_ps(factor(i));
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
            scale(&mut scaled, scales);
            write_transposed(&scaled, sums, rows, token, column);
        }
    }
}
