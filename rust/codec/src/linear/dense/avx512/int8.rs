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
use crate::linear::avx512::bytes::{to_bytes, Scaled, PART};
use crate::linear::avx512::decode::{ByteDecoder, CHUNK, CHUNK_BYTES};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::dense::avx512::lanes::Fours;
use crate::linear::dense::avx512::{nn, nt};
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
    /// What the bytes of a token are multiplied by.
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
        let mut scales = vec![0.0; count];
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
    let largest = f32::from_bits(largest);
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
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
    largest / 127.0
}

/// A product, ready for its strips.
struct Product<'a> {
    bodies: &'static Bodies,
    weight: &'a Weight<'a>,
    nibbles: Option<Nibbles<'a>>,
    tokens: Tokens<[u8; 4]>,
    /// Of tokens.
    scales: Vec<f32>,
}

impl Product<'_> {
    /// Writes the sums of some rows of W, (tokens, rows).
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn sums(&self, rows: Range<usize>, sums: &mut [f32]) {
        let (tokens, height) = (&self.tokens, rows.len());
        let width = tokens.slivers.iter().map(|(_, width)| width).sum::<usize>();
        let low = if width == 0 { LOW } else { STRIP };
        let scaled = Scaled::new(self.weight, self.nibbles.as_ref(), rows.clone());
        let mut turned = Scratch::<f32>::new(width * height);
        turned.fill(0.0);
        let (_, few) = tokens.piece(0);
        let rest = tokens.rest.len();
        let dots = &mut sums[tokens.rest.start * height..];
        dots.fill(0.0);
        debug_assert!(few.len() >= rest);
        let mut panel = Scratch::<Four>::new(low.min(height) * COLUMNS / 4);
        let mut starts = [0; STRIP];
        let mut found = Scratch::<i32>::new(low * 32);
        for part in 0..tokens.pieces.len() {
            for first in (0..height).step_by(low) {
                let here = first..(first + low).min(height);
                let (panel, starts) = (&mut panel[..], &mut starts[..here.len()]);
                let lanes = tokens.pieces[part].len() / 4;
                let panel = &mut panel[..here.len() * lanes];
                let of_strip = OfStrip { scaled: &scaled, first: rows.start };
                self.decode(&of_strip, here.clone(), part, panel, starts);
                let steps = here.clone().map(|row| scaled.step(row, part));
                let (slivers, few) = tokens.piece(part);
                let mut turned = &mut turned[..];
                for (sliver, width, next) in slivers {
                    let found = &mut found[..here.len() * width];
                    for (found, start) in found.chunks_exact_mut(width).zip(&*starts) {
                        found.fill(*start);
                    }
                    // SAFETY: the caller found the instruction.
                    unsafe { nn::<Fours>(panel, sliver, width, found, next) };
                    let (to, others) = turned.split_at_mut(width * height);
                    let to = &mut to[here.start * width..here.end * width];
                    for (row, step) in steps.clone().enumerate() {
                        let row = row * width..(row + 1) * width;
                        add_scaled(&found[row.clone()], step, &mut to[row]);
                    }
                    turned = others;
                }
                let found = &mut found[..here.len() * rest];
                for found in found.chunks_exact_mut(here.len()) {
                    found.copy_from_slice(starts);
                }
                // SAFETY: as above.
                unsafe { nt::<Fours>(few, panel, lanes, found) };
                for (dots, found) in dots.chunks_mut(height).zip(found.chunks(here.len())) {
                    let dots = dots[here.clone()].iter_mut().zip(found).zip(steps.clone());
                    dots.for_each(|((dot, &found), step)| *dot += step * found as f32);
                }
            }
        }
        let mut turned = &turned[..];
        for (tokens, width) in &tokens.slivers {
            let (from, others) = turned.split_at(width * height);
            let to = &mut sums[tokens.start * height..tokens.end * height];
            turn(self.bodies, (from, *width), (to, height), (height, tokens.len()));
            turned = others;
        }
        for (sums, scale) in sums.chunks_mut(height).zip(&self.scales) {
            for sum in sums {
                *sum *= scale;
            }
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
        let Scaled { factors, parts, .. } = strip.scaled;
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
                let step = strip.scaled.steps[row * parts + part];
                let factor = if step > 0.0 { 1.0 / step } else { 0.0 };
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

/// `sums += step * found`.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_scaled(found: &[i32], step: f32, sums: &mut [f32]) {
    sums.iter_mut().zip(found).for_each(|(sum, &found)| *sum += step * found as f32);
}
