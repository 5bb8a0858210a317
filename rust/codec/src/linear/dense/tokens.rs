//! Tokens laid out for products with many rows of a weight, as terms of sums.
//!
//! ```text
//! piece of columns 0 | sliver 0: (terms, 32) | sliver 1 ... | the rest: (tokens, terms) |
//! piece of columns 1 | ...
//! ```
//!
//! A sliver is 32 or 16 tokens turned, so that a row of W times a sliver is a row of an `nn`; up
//! to 8 tokens at the end stay as they lie, for `nt`.

use std::ops::Range;

use crate::error::CodecError;
use crate::linear::dense::terms::{terms, Lane, Term};
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::{Bodies, Engine};
use crate::values::Values;

/// Most tokens that stay as they lie.
const REST: usize = 8;

/// Side of a square that is turned at a time.
const SIDE: usize = 16;

/// A sliver, its width, and what comes after it.
pub(crate) type Sliver<'a, P> = (&'a [P], usize, &'a [P]);

/// Tokens in slivers, by pieces of columns.
pub(crate) struct Tokens<P: Lane> {
    /// The columns of each piece.
    pub(crate) pieces: Vec<Range<usize>>,
    /// The tokens of each sliver, and its width: there may be fewer.
    pub(crate) slivers: Vec<(Range<usize>, usize)>,
    /// The tokens that stay as they lie.
    pub(crate) rest: Range<usize>,
    terms: Scratch<P>,
}

/// What a thread lays out at a time.
struct Job<'a, P> {
    columns: Range<usize>,
    tokens: Range<usize>,
    /// 0 for tokens that stay as they lie.
    width: usize,
    to: &'a mut [P],
}

impl<P: Term> Tokens<P> {
    /// Lays out `x`, (count, cols).
    pub(crate) fn new(
        engine: Engine,
        x: Values<'_>,
        (count, cols): (usize, usize),
        pieces: Vec<Range<usize>>,
    ) -> Result<Self, CodecError> {
        Self::of_rows(engine, (count, cols), pieces, |token, columns, to| {
            let values = token * cols + columns.start..token * cols + columns.end;
            P::lay_out(engine.bodies, x.range(values), to);
        })
    }
}

impl<P: Lane> Tokens<P> {
    /// Lays out rows that `write` writes: of a token, some columns, as terms.
    pub(crate) fn of_rows(
        engine: Engine,
        (count, cols): (usize, usize),
        pieces: Vec<Range<usize>>,
        write: impl Fn(usize, Range<usize>, &mut [P]) + Sync,
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
        // All pieces but the last are whole terms.
        let room = Scratch::new(width * terms::<P>(cols));
        let mut this = Self { pieces, slivers, rest, terms: room };

        let mut all = &mut this.terms[..];
        let mut jobs = Vec::new();
        let rest = (this.rest.clone(), 0);
        for columns in &this.pieces {
            for (tokens, width) in this.slivers.iter().chain([&rest]).cloned() {
                let height = if width == 0 { tokens.len() } else { width };
                let (to, others) = all.split_at_mut(height * terms::<P>(columns.len()));
                all = others;
                jobs.push(Job { columns: columns.clone(), tokens, width, to });
            }
        }
        parallel::for_each(count * cols, engine, jobs.into_iter(), |job| {
            lay_out(engine.bodies, &write, job);
        })?;
        Ok(this)
    }

    /// The slivers of a piece, and the rest.
    pub(crate) fn piece(&self, piece: usize) -> (impl Iterator<Item = Sliver<'_, P>>, &[P]) {
        let width = self.slivers.iter().map(|(_, width)| width).sum::<usize>();
        let [start, len] = [self.pieces[piece].start, self.pieces[piece].len()].map(terms::<P>);
        let mut all = &self.terms[start * (width + self.rest.len())..];
        let rest = &all[len * width..][..len * self.rest.len()];
        let slivers = self.slivers.iter().map(move |&(_, width)| {
            let (sliver, others) = all.split_at(len * width);
            all = others;
            (sliver, width, &others[..others.len().min(sliver.len())])
        });
        (slivers, rest)
    }
}

fn lay_out<P: Lane>(
    bodies: &'static Bodies,
    write: impl Fn(usize, Range<usize>, &mut [P]),
    job: Job<'_, P>,
) {
    let Job { columns, tokens, width, to } = job;
    let len = terms::<P>(columns.len());
    if width == 0 {
        for (token, to) in tokens.zip(to.chunks_exact_mut(len)) {
            write(token, columns.clone(), to);
        }
        return;
    }
    let mut room = Scratch::new(SIDE * len);
    for (side, first) in (0..width).step_by(SIDE).zip(tokens.clone().step_by(SIDE)) {
        let count = (tokens.end - first).min(SIDE);
        for (token, to) in (first..first + count).zip(room.chunks_exact_mut(len)) {
            write(token, columns.clone(), to);
        }
        room[count * len..].fill(P::ZERO);
        turn(bodies, (&room, len), (&mut to[side..], width), (SIDE, len));
    }
}

/// Writes a matrix of `rows` by `cols` turned; of both, the distance of rows is given.
pub(crate) fn turn<P: Lane>(
    bodies: &'static Bodies,
    (from, from_stride): (&[P], usize),
    (to, to_stride): (&mut [P], usize),
    (rows, cols): (usize, usize),
) {
    let mut square = [[P::ZERO; SIDE]; SIDE];
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
            P::transpose(bodies, &mut square);
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
