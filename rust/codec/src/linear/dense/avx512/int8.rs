//! Sums of `x W^T` with both factors rounded to 8 bits, by products of four bytes a lane.
//!
//! ```text
//! x[m][k]   ~ xs[m] * (xu[m][k] - 128)         xs = max |x[m]| / 127
//! W[n][k]   ~ ws[n][p] * wq[n][k]              see [`bytes`](crate::linear::avx512::bytes)
//! sums      = xs[m] * sum over p of ws[n][p] * (sum over the part of xu wq, less 128 wq)
//! ```
//!
//! The instruction takes bytes without signs on one side. The inner sums are exact integers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::error::CodecError;
use crate::linear::adapter::Floats;
use crate::linear::avx512::bytes::{inverse, step_of, to_bytes, Scaled, PART};
use crate::linear::avx512::decode::{ByteDecoder, CHUNK, CHUNK_BYTES};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::dense::avx512::lanes::Fours;
use crate::linear::dense::avx512::{nn, nt};
use crate::linear::dense::terms::SLIVER;
use crate::linear::dense::tokens::{turn, Tokens};
use crate::linear::epilogue::Epilogue;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::{Bodies, Engine};
use crate::values::{Element, Values};
use crate::x86::avx512::store;
use crate::x86::prefetch_l2;

/// Rows of W that a thread takes at a time: whole tiles of sums.
const STRIP: usize = 8 * 14;
/// Of these, rows in a panel where few tokens use it: it stays in the first-level cache.
const LOW: usize = 28;
/// Bytes of a row in a panel.
const COLUMNS: usize = PART * CHUNK;
/// Rows of codes that are fetched ahead.
const ROWS_AHEAD: usize = 8;

/// Four bytes of a row of W.
type Four = [i8; 4];

/// Writes `y = x W^T` with what `epilogue` adds.
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The machine must have AVX-512 with BW, DQ, VL and VNNI.
pub(crate) unsafe fn forward<T: Element>(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let count = y.len() / weight.rows;
    let nibbles = Nibbles::of(weight);
    let x = Rounded::new(engine, x, (count, weight.cols), nibbles.is_some())?;
    let parts = (0..x.cols).step_by(COLUMNS).map(|at| at..(at + COLUMNS).min(x.cols));
    let tokens =
        Tokens::of_rows(engine, (count, x.cols), parts.collect(), |token, columns, to| {
            to.copy_from_slice(x.bytes[token * x.cols..][columns].as_chunks().0);
        })?;
    let product = Product { bodies: engine.bodies, weight, nibbles, tokens, scales: x.scales };
    let work = weight.rows.saturating_mul(weight.cols).saturating_mul(count.div_ceil(16));
    let jobs = strips::split(y, weight.rows, STRIP).into_iter();
    parallel::for_each(work, engine, jobs, |strip: Strip<'_, T>| {
        let mut sums = Scratch::new(count * strip.columns.len());
        // SAFETY: the caller vouches for the features.
        unsafe { product.sums(strip.columns.clone(), &mut sums) };
        epilogue.finish(strip, &mut sums);
    })
}

/// x as bytes, in the order in which those of W are decoded.
struct Rounded {
    /// (tokens, cols)
    bytes: Vec<u8>,
    /// What the bytes of a token are multiplied by; behind the last one, zeros for a sliver.
    scales: Vec<f32>,
    /// Whole chunks.
    cols: usize,
}

impl Rounded {
    fn new(
        engine: Engine,
        x: Values<'_>,
        (count, cols): (usize, usize),
        nibbles: bool,
    ) -> Result<Self, CodecError> {
        let padded = cols.next_multiple_of(CHUNK);
        let mut bytes = vec![0; count * padded];
        let mut scales = vec![0.0; count + SLIVER];
        let jobs = bytes.chunks_mut(padded).zip(&mut scales).zip(x.chunks(cols));
        parallel::for_each(x.len(), engine, jobs, |((bytes, scale), x)| {
            let floats = Floats::new(engine.bodies, x);
            // SAFETY: the caller of `forward` vouches for the features.
            *scale = unsafe { round_token(&floats, nibbles, bytes) };
        })?;
        Ok(Self { bytes, scales, cols: padded })
    }
}

/// Rounds a token; what its bytes stand for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn round_token(x: &[f32], nibbles: bool, bytes: &mut [u8]) -> f32 {
    // NaN is the largest magnitude as an integer, and makes the token's sums NaN.
    let largest = x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
    let scale = step_of(f32::from_bits(largest));
    let factor = inverse(scale);
    for (to, x) in bytes.as_chunks_mut::<CHUNK>().0.iter_mut().zip(x.chunks(CHUNK)) {
        let rounded = to_bytes(x, factor).map(|byte| byte ^ 0x80);
        if nibbles {
            let (odd, even) = to.split_at_mut(CHUNK / 2);
            let pairs = rounded.as_chunks::<2>().0;
            odd.iter_mut().zip(pairs).for_each(|(to, pair)| *to = pair[1]);
            even.iter_mut().zip(pairs).for_each(|(to, pair)| *to = pair[0]);
        } else {
            *to = rounded;
        }
    }
    scale
}

/// A product, ready for its strips.
struct Product<'a> {
    bodies: &'static Bodies,
    weight: &'a Weight<'a>,
    nibbles: Option<Nibbles<'a>>,
    tokens: Tokens<[u8; 4]>,
    /// See [`Rounded`].
    scales: Vec<f32>,
}

/// Some rows of a strip in a part of the columns.
struct Panel<'a> {
    part: usize,
    /// Among those of the strip, and how many it has.
    rows: Range<usize>,
    height: usize,
    /// (rows, fours of columns).
    bytes: &'a [Four],
    /// What the integers of each row start at, and what they are multiplied by.
    starts: &'a [i32],
    steps: &'a [f32],
}

impl Product<'_> {
    /// Writes the sums of some rows of W, (tokens, rows).
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn sums(&self, rows: Range<usize>, sums: &mut [f32]) {
        let (tokens, height) = (&self.tokens, rows.len());
        let width = tokens.slivers.iter().map(|(_, width)| width).sum::<usize>();
        let low = if width == 0 { LOW } else { STRIP }.min(height);
        let scaled = Scaled::new(self.weight, self.nibbles.as_ref(), rows.clone());
        let strip = OfStrip { scaled: &scaled, first: rows.start };
        let mut turned = Scratch::<f32>::new(width * height);
        turned.fill(0.0);
        let dots = &mut sums[tokens.rest.start * height..];
        dots.fill(0.0);
        let mut room = Scratch::<Four>::new(low * COLUMNS / 4);
        let (mut starts, mut steps) = ([0; STRIP], [0.0; STRIP]);
        let mut found = Scratch::<i32>::new(low * SLIVER);
        for (part, columns) in tokens.pieces.iter().enumerate() {
            for first in (0..height).step_by(low) {
                let rows = first..(first + low).min(height);
                let bytes = &mut room[..rows.len() * columns.len() / 4];
                let (starts, steps) = (&mut starts[..rows.len()], &mut steps[..rows.len()]);
                self.decode(&strip, rows.clone(), part, bytes, starts);
                steps.iter_mut().zip(rows.clone()).for_each(|(s, row)| *s = scaled.step(row, part));
                let panel = Panel { part, rows, height, bytes, starts, steps };
                self.add_slivers(&panel, &mut found, &mut turned);
                self.add_rest(&panel, &mut found, dots);
            }
        }
        let mut turned = &turned[..];
        for (tokens, width) in &tokens.slivers {
            let (from, others) = turned.split_at(width * height);
            let to = &mut sums[tokens.start * height..tokens.end * height];
            turn(self.bodies, (from, *width), (to, height), (height, tokens.len()));
            turned = others;
        }
    }

    /// Adds the products of a panel with slivers of tokens: of each sliver, (rows, tokens).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_slivers(&self, panel: &Panel<'_>, found: &mut [i32], mut sums: &mut [f32]) {
        let (slivers, _) = self.tokens.piece(panel.part);
        for ((sliver, width, next), (tokens, _)) in slivers.zip(&self.tokens.slivers) {
            let found = &mut found[..panel.rows.len() * width];
            for (found, start) in found.chunks_exact_mut(width).zip(panel.starts) {
                found.fill(*start);
            }
            // SAFETY: the caller found the instruction.
            unsafe { nn::<Fours>(panel.bytes, sliver, width, found, next) };
            let scales = &self.scales[tokens.start..][..width];
            let (to, others) = sums.split_at_mut(width * panel.height);
            let rows = to[panel.rows.start * width..].chunks_exact_mut(width);
            for ((to, found), step) in rows.zip(found.chunks_exact(width)).zip(panel.steps) {
                add_scaled(found, *step, scales, to);
            }
            sums = others;
        }
    }

    /// Adds the products of a panel with the tokens that stay as they lie, (tokens, rows).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_rest(&self, panel: &Panel<'_>, found: &mut [i32], sums: &mut [f32]) {
        let (_, few) = self.tokens.piece(panel.part);
        let (rest, count) = (self.tokens.rest.clone(), panel.rows.len());
        let found = &mut found[..count * rest.len()];
        for found in found.chunks_exact_mut(count) {
            found.copy_from_slice(panel.starts);
        }
        // SAFETY: the caller found the instruction.
        unsafe { nt::<Fours>(few, panel.bytes, panel.bytes.len() / count, found) };
        let rows = sums.chunks_exact_mut(panel.height).zip(found.chunks_exact(count));
        for ((sums, found), scale) in rows.zip(&self.scales[rest]) {
            add_scaled(found, *scale, panel.steps, &mut sums[panel.rows.clone()]);
        }
    }

    /// Writes a part of some rows of the strip as bytes, and what their sums start at.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn decode(
        &self,
        strip: &OfStrip<'_>,
        rows: Range<usize>,
        part: usize,
        panel: &mut [Four],
        starts: &mut [i32],
    ) {
        let factors = &strip.scaled.factors;
        let columns = self.tokens.pieces[part].clone();
        let chunks = self.tokens.pieces.last().map_or(0, |piece| piece.end) / CHUNK;
        let mut values = Scratch::<f32>::new(columns.len());
        let ones = _mm512_set1_epi8(1);
        for ((row, panel), start) in rows.zip(panel.chunks_exact_mut(columns.len() / 4)).zip(starts)
        {
            let to = panel.as_flattened_mut().as_chunks_mut::<64>().0;
            let at = strip.first + row;
            let mut sum = _mm512_setzero_si512();
            if let Some(nibbles) = &self.nibbles {
                let decoder = ByteDecoder::new(nibbles.table);
                let bytes_per_row = self.weight.cols / 2;
                let codes = &nibbles.packed[at * bytes_per_row..(at + 1) * bytes_per_row];
                let codes = codes[columns.start / 2..].chunks(CHUNK_BYTES);
                let numbers = &factors[(row * chunks + columns.start / CHUNK) * 2..];
                let numbers = numbers.as_chunks::<2>().0;
                for ((codes, numbers), to) in codes.zip(numbers).zip(to.as_chunks_mut::<2>().0) {
                    prefetch_l2(codes, ROWS_AHEAD * bytes_per_row);
                    let mut room = [0; CHUNK_BYTES];
                    let codes = codes.first_chunk().unwrap_or_else(|| {
                        room[..codes.len()].copy_from_slice(codes);
                        &room
                    });
                    for (to, bytes) in to.iter_mut().zip(decoder.row(codes, numbers)) {
                        store(to, bytes);
                        sum = _mm512_dpbusd_epi32(sum, ones, bytes);
                    }
                }
            } else {
                let inside = columns.start..columns.end.min(self.weight.cols);
                let values = &mut values[..inside.len()];
                self.weight.widened_piece::<f32>(self.bodies, at..at + 1, inside, values);
                let factor = inverse(strip.scaled.step(row, part));
                for (values, to) in values.chunks(CHUNK).zip(to.as_chunks_mut::<2>().0) {
                    let bytes = to_bytes(values, factor);
                    for (to, from) in to.iter_mut().zip(bytes.as_chunks::<64>().0) {
                        let bytes = crate::x86::avx512::load(from);
                        store(to, bytes);
                        sum = _mm512_dpbusd_epi32(sum, ones, bytes);
                    }
                }
            }
            *start = -128 * _mm512_reduce_add_epi32(sum);
        }
    }
}

/// What the bytes of a strip stand for, and its first row.
struct OfStrip<'a> {
    scaled: &'a Scaled,
    first: usize,
}

/// `sums += found * factor * factors`; the factors first, lest a product be infinite.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_scaled(found: &[i32], factor: f32, factors: &[f32], sums: &mut [f32]) {
    for ((sum, &found), other) in sums.iter_mut().zip(found).zip(factors) {
        *sum += found as f32 * (factor * other);
    }
}
