//! `y = x W^T` by decoded panels: sums of 16 or 32 tokens by the rows of a strip.

use crate::error::CodecError;
use crate::linear::dense::terms::{terms, Products, Term};
use crate::linear::dense::tokens::{turn, Tokens};
use crate::linear::epilogue::Epilogue;
use crate::linear::pieces::cut;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::Engine;
use crate::values::{Element, Values};

/// Tokens that one decoded panel is multiplied with: what bounds all scratch.
pub(crate) const TOKENS: usize = 512;

/// Rows of W that a thread takes at a time: whole tiles of the AVX-512 body.
const STRIP: usize = 8 * 14;

/// Rows and columns of a panel by the number of tokens. For few it is decoded into the first-level
/// cache or near it; for many it is a fourth of a small second-level cache, and x comes by less
/// often.
fn panel(tokens: usize) -> (usize, usize) {
    match tokens {
        0..=8 => (12, 1024),
        9..=64 => (28, 1024),
        _ => (STRIP, 1024),
    }
}

/// Writes `y` for up to [`TOKENS`] tokens of `x`, strip by strip.
pub(crate) fn run<T: Element, P: Term>(
    engine: Engine,
    products: Products<P>,
    x: Values<'_>,
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let count = y.len().checked_div(weight.rows).unwrap_or(0);
    let tokens = Tokens::new(
        engine,
        x,
        (count, weight.cols),
        cut(weight.cols, panel(count).1, weight.unit()),
    )?;
    let work = weight.rows.saturating_mul(weight.cols).saturating_mul(count.div_ceil(4));
    let jobs = strips::split(y, weight.rows, STRIP).into_iter();
    parallel::for_each(work, engine, jobs, |strip: Strip<'_, T>| {
        multiply(engine, products, &tokens, count, weight, epilogue, strip);
    })
}

/// The sums of a strip, turned by slivers, and what `nt` adds up, by panels; then the strip.
fn multiply<T: Element, P: Term>(
    engine: Engine,
    products: Products<P>,
    tokens: &Tokens<P>,
    count: usize,
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    strip: Strip<'_, T>,
) {
    let bodies = engine.bodies;
    let rows = strip.columns.clone();
    let (height, _) = panel(count);
    let width = tokens.slivers.iter().map(|(_, width)| width).sum::<usize>();
    let columns = tokens.pieces.iter().map(|piece| terms::<P>(piece.len())).max().unwrap_or(0);
    let rest = tokens.rest.len();
    let mut panel = Scratch::<P>::new(height * columns);
    let lens = [width * rows.len(), rest * rows.len(), count * rows.len()];
    let mut scratch = Scratch::<f32>::new(lens.iter().sum());
    let (turned, scratch) = scratch.split_at_mut(lens[0]);
    let (dots, sums) = scratch.split_at_mut(lens[1]);
    turned.fill(0.0);
    dots.fill(0.0);
    for (i, columns) in tokens.pieces.iter().enumerate() {
        for start in rows.clone().step_by(height) {
            let part = start..(start + height).min(rows.end);
            let panel = &mut panel[..part.len() * terms::<P>(columns.len())];
            P::decode::<T>(weight, bodies, part.clone(), columns.clone(), panel);
            let (slivers, few) = tokens.piece(i);
            let mut turned = &mut turned[..];
            for (sliver, width, next) in slivers {
                let (sums, others) = turned.split_at_mut(width * rows.len());
                let sums = &mut sums[(start - rows.start) * width..][..part.len() * width];
                (products.nn)(panel, sliver, width, sums, next);
                turned = others;
            }
            let place = (start - rows.start) * rest;
            let dots = &mut dots[place..place + part.len() * rest];
            (products.nt)(few, panel, terms::<P>(columns.len()), dots);
        }
    }
    let mut turned = &*turned;
    for (tokens, width) in &tokens.slivers {
        let (from, others) = turned.split_at(width * rows.len());
        let to = &mut sums[tokens.start * rows.len()..tokens.end * rows.len()];
        turn(bodies, (from, *width), (to, rows.len()), (rows.len(), tokens.len()));
        turned = others;
    }
    let left = &mut sums[tokens.rest.start * rows.len()..];
    for (panel, from) in dots.chunks(height * rest.max(1)).enumerate() {
        let part = from.len() / rest;
        for (row, from) in left.chunks_exact_mut(rows.len()).zip(from.chunks_exact(part)) {
            row[panel * height..][..part].copy_from_slice(from);
        }
    }
    epilogue.finish(strip, sums);
}
