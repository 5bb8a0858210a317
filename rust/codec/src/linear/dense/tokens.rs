//! Tokens laid out for products with many rows of a weight, as floats.
//!
//! ```text
//! piece of columns 0 | sliver 0: (columns, 32) | sliver 1 ... | the rest: (tokens, columns) |
//! piece of columns 1 | ...
//! ```
//!
//! A sliver is 32 or 16 tokens turned, so that a row of W times a sliver is a row of an `nn`; up
//! to 8 tokens at the end stay as they lie, for `nt`.

use std::ops::Range;

use crate::error::CodecError;
use crate::parallel;
use crate::simd::{Bodies, Engine};
use crate::values::Values;

/// Most tokens that stay as they lie.
const REST: usize = 8;

/// Side of a square that is turned at a time.
const SIDE: usize = 16;

/// A sliver, its width, and what comes after it.
pub(crate) type Sliver<'a> = (&'a [f32], usize, &'a [f32]);

/// Tokens in slivers, by pieces of columns.
pub(crate) struct Tokens {
    /// The columns of each piece.
    pub(crate) pieces: Vec<Range<usize>>,
    /// The tokens of each sliver, and its width: there may be fewer.
    pub(crate) slivers: Vec<(Range<usize>, usize)>,
    /// The tokens that stay as they lie.
    pub(crate) rest: Range<usize>,
    floats: Vec<f32>,
}

/// What a thread lays out at a time.
struct Job<'a> {
    columns: Range<usize>,
    tokens: Range<usize>,
    /// 0 for tokens that stay as they lie.
    width: usize,
    to: &'a mut [f32],
}

impl Tokens {
    /// Lays out `x`, (count, cols).
    pub(crate) fn new(
        engine: Engine,
        x: Values<'_>,
        (count, cols): (usize, usize),
        pieces: Vec<Range<usize>>,
    ) -> Result<Self, CodecError> {
        let mut slivers = Vec::new();
        let mut next = 0;
        while count - next > REST {
            let left = count - next;
            let width = if left > SIDE + REST { 2 * SIDE } else { SIDE };
            slivers.push((next..(next + width).min(count), width));
            next = (next + width).min(count);
        }
        let rest = next..count;
        let width = slivers.iter().map(|(_, width)| width).sum::<usize>() + rest.len();
        let mut this = Self { pieces, slivers, rest, floats: vec![0.0; width * cols] };

        let mut floats = &mut this.floats[..];
        let mut jobs = Vec::new();
        let rest = (this.rest.clone(), 0);
        for columns in &this.pieces {
            for (tokens, width) in this.slivers.iter().chain([&rest]).cloned() {
                let len = if width == 0 { tokens.len() } else { width } * columns.len();
                let (to, others) = floats.split_at_mut(len);
                floats = others;
                jobs.push(Job { columns: columns.clone(), tokens, width, to });
            }
        }
        parallel::for_each(x.len(), engine, jobs.into_iter(), |job| {
            lay_out(engine.bodies, x, cols, job);
        })?;
        Ok(this)
    }

    /// The slivers of a piece, and the rest.
    pub(crate) fn piece(&self, piece: usize) -> (impl Iterator<Item = Sliver<'_>>, &[f32]) {
        let width = self.slivers.iter().map(|(_, width)| width).sum::<usize>();
        let columns = self.pieces[piece].clone();
        let mut floats = &self.floats[columns.start * (width + self.rest.len())..];
        let rest = &floats[columns.len() * width..][..columns.len() * self.rest.len()];
        let slivers = self.slivers.iter().map(move |&(_, width)| {
            let (sliver, others) = floats.split_at(columns.len() * width);
            floats = others;
            (sliver, width, &others[..others.len().min(sliver.len())])
        });
        (slivers, rest)
    }
}

fn lay_out(bodies: &'static Bodies, x: Values<'_>, cols: usize, job: Job<'_>) {
    let Job { columns, tokens, width, to } = job;
    let row = |token: usize| x.range(token * cols + columns.start..token * cols + columns.end);
    if width == 0 {
        for (token, to) in tokens.zip(to.chunks_exact_mut(columns.len())) {
            (bodies.widen)(row(token), to);
        }
        return;
    }
    let len = columns.len();
    let mut floats = vec![0.0; SIDE * len];
    for (side, first) in (0..width).step_by(SIDE).zip(tokens.clone().step_by(SIDE)) {
        let count = (tokens.end - first).min(SIDE);
        for (token, floats) in (first..first + count).zip(floats.chunks_exact_mut(len)) {
            (bodies.widen)(row(token), floats);
        }
        floats[count * len..].fill(0.0);
        turn(bodies, (&floats, len), (&mut to[side..], width), (SIDE, len));
    }
}

/// Writes a matrix of `rows` by `cols` turned; of both, the distance of rows is given.
pub(crate) fn turn(
    bodies: &'static Bodies,
    (from, from_stride): (&[f32], usize),
    (to, to_stride): (&mut [f32], usize),
    (rows, cols): (usize, usize),
) {
    let mut square = [[0.0; SIDE]; SIDE];
    for i in (0..rows).step_by(SIDE) {
        let height = (rows - i).min(SIDE);
        for j in (0..cols).step_by(SIDE) {
            let width = (cols - j).min(SIDE);
            for (r, row) in square.iter_mut().take(height).enumerate() {
                let from = &from[(i + r) * from_stride + j..];
                match from.first_chunk() {
                    Some(from) if width == SIDE => *row = *from,
                    _ => row[..width].copy_from_slice(&from[..width]),
                }
            }
            (bodies.transpose)(&mut square);
            for (c, column) in square.iter().take(width).enumerate() {
                let to = &mut to[(j + c) * to_stride + i..];
                match to.first_chunk_mut() {
                    Some(to) if height == SIDE => *to = *column,
                    _ => to[..height].copy_from_slice(&column[..height]),
                }
            }
        }
    }
}
