//! `dX = dY W + G A`.

use std::borrow::Cow;
use std::ops::Range;

use crate::error::CodecError;
use crate::layout::{check_len, num_blocks};
use crate::linear::adapter::{Factors, Lora};
use crate::linear::dense::forward::TOKENS;
use crate::linear::dense::terms::{terms, Products, Term};
use crate::linear::lora::thin;
use crate::linear::pieces::cut;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::scales::Scales;
use crate::scratch::Scratch;
use crate::simd::Engine;
use crate::values::{with_slice, Element, Values, ValuesMut};

/// Columns of dX that a thread takes at a time; where rows share blocks, both ends of a piece of
/// a row decode in vain, so pieces are longer.
const STRIP: usize = 128;
const LONG_STRIP: usize = 512;

/// Rows of W in a panel.
const ROWS: usize = 256;

/// Writes `dX = dY W`, and the adapter's part if there is one.
///
/// `grad` is dY, (M, `weight.rows`), and `dx` (M, `weight.cols`). W is what `dequantize` gives in
/// the dtype of `dx`, which is best that of `grad`: the weight that the forward multiplied.
///
/// # Errors
/// [`CodecError::Length`], [`CodecError::Shape`], [`CodecError::Blocksize`],
/// [`CodecError::TableNotFinite`] and [`CodecError::Interrupted`].
pub fn linear_backward(
    engine: Engine,
    grad: Values<'_>,
    weight: &Weight<'_>,
    lora: Option<Lora<'_>>,
    dx: ValuesMut<'_>,
) -> Result<(), CodecError> {
    weight.check()?;
    lora.map_or(Ok(()), |lora| lora.check(weight))?;
    let tokens = dx.len().checked_div(weight.cols).unwrap_or(0);
    check_len("dx", dx.len(), tokens * weight.cols, (tokens, "tokens"))?;
    if weight.cols > 0 {
        check_len("grad", grad.len(), tokens * weight.rows, (tokens, "tokens"))?;
    }
    let lora = lora.filter(|lora| lora.rank > 0 && tokens > 0 && weight.rows > 0);
    let lora = lora.map(|lora| lora.factors(engine.bodies));
    let lora = lora.as_ref();
    let g = |lora: &Factors<'_>| thin(engine, grad, &lora.b, lora.rank, lora.scaling);
    let g = lora.map(g).transpose()?.unwrap_or_default();
    let adapter = lora.map(|lora| (g.as_slice(), &*lora.a, lora.rank));
    if let (Values::Bf16(grad), Some(tiles)) = (grad, engine.bodies.tiles) {
        if tokens > 1 && weight.rows > 0 && weight.chunks_have_scales() {
            return (tiles.backward)(engine, grad, weight, adapter, dx);
        }
    }
    with_slice!(dx, ValuesMut, dx => match (grad, engine.bodies.pairs) {
        (Values::Bf16(_), Some(pairs)) => dense(engine, pairs, grad, weight, adapter, dx),
        _ => dense(engine, engine.bodies.floats, grad, weight, adapter, dx),
    })
}

/// G, A and the rank.
pub(crate) type Adapter<'a> = (&'a [f32], &'a [f32], usize);

/// By decoded panels, some tokens at a time.
fn dense<T: Element, P: Term>(
    engine: Engine,
    products: Products<P>,
    grad: Values<'_>,
    weight: &Weight<'_>,
    adapter: Option<Adapter<'_>>,
    dx: &mut [T],
) -> Result<(), CodecError> {
    let Weight { rows, cols, .. } = *weight;
    // Decoded once: a strip takes a few scales of each row, which is slow beside panels of pairs.
    let pairs = P::VALUES > 1;
    let scales = pairs.then(|| all_scales(engine, weight)).transpose()?;
    let scales = scales.as_deref().map_or(weight.scales, Scales::Plain);
    let weight = &Weight { scales, ..*weight };
    for (block, dx) in dx.chunks_mut((TOKENS * cols).max(1)).enumerate() {
        let tokens = block * TOKENS..block * TOKENS + dx.len() / cols;
        let grad =
            Grad::<P>::new(engine, grad.range(tokens.start * rows..tokens.end * rows), rows)?;
        let adapter =
            adapter.map(|(g, a, rank)| (&g[tokens.start * rank..tokens.end * rank], a, rank));
        let work = rows.saturating_mul(cols).saturating_mul(tokens.len().div_ceil(4));
        let strip = STRIP * P::VALUES;
        let width = if weight.rows_are_blocks() { strip.max(weight.unit()) } else { LONG_STRIP };
        let jobs = strips::split(dx, cols, width / weight.unit() * weight.unit()).into_iter();
        parallel::for_each(work, engine, jobs, |strip: Strip<'_, T>| {
            multiply(engine, products, &grad, weight, adapter, strip);
        })?;
    }
    Ok(())
}

/// The scales of all blocks: strips take a few of each row, which are slow to decode one by one.
pub(crate) fn all_scales<'a>(
    engine: Engine,
    weight: &Weight<'a>,
) -> Result<Cow<'a, [f32]>, CodecError> {
    /// Scales of a job.
    const JOB: usize = 1 << 13;
    if let Scales::Plain(scales) = weight.scales {
        return Ok(Cow::Borrowed(scales));
    }
    let count = num_blocks(weight.rows * weight.cols, weight.blocksize);
    let mut scales = vec![0.0; count];
    let jobs = scales.chunks_mut(JOB).enumerate();
    parallel::for_each(8 * count, engine, jobs, |(job, scales)| {
        (engine.bodies.write_scales)(&weight.scales, job * JOB, scales);
    })?;
    Ok(Cow::Owned(scales))
}

/// dY as terms, by pieces of columns.
struct Grad<P: Term> {
    pieces: Vec<Range<usize>>,
    terms: Scratch<P>,
}

impl<P: Term> Grad<P> {
    fn new(engine: Engine, grad: Values<'_>, cols: usize) -> Result<Self, CodecError> {
        let tokens = grad.len().checked_div(cols).unwrap_or(0);
        let mut room = Scratch::new(tokens * terms::<P>(cols));
        let pieces = cut(cols, ROWS, 16);
        let mut jobs = Vec::new();
        let mut rest = &mut room[..];
        for piece in &pieces {
            let (to, others) = rest.split_at_mut(tokens * terms::<P>(piece.len()));
            jobs.push((piece.clone(), to));
            rest = others;
        }
        parallel::for_each(grad.len(), engine, jobs.into_iter(), |(columns, to)| {
            for (token, row) in to.chunks_exact_mut(terms::<P>(columns.len())).enumerate() {
                let values = token * cols + columns.start..token * cols + columns.end;
                P::lay_out(engine.bodies, grad.range(values), row);
            }
        })?;
        Ok(Self { pieces, terms: room })
    }
}

/// The sums of some columns, panel by panel of W's rows; then dX.
fn multiply<T: Element, P: Term>(
    engine: Engine,
    products: Products<P>,
    grad: &Grad<P>,
    weight: &Weight<'_>,
    adapter: Option<Adapter<'_>>,
    strip: Strip<'_, T>,
) {
    let (bodies, columns) = (engine.bodies, strip.columns.clone());
    let (tokens, width) = (strip.rows.len(), columns.len());
    let height = grad.pieces.iter().map(|piece| terms::<P>(piece.len())).max().unwrap_or(0);
    let mut panel = Scratch::<P>::new(height * width);
    // Of each sliver, (tokens, columns).
    let sliver = P::SLIVER.min(width);
    let mut sums = Scratch::<f32>::new(tokens * width);
    sums.fill(0.0);
    for rows in &grad.pieces {
        let [start, height] = [rows.start, rows.len()].map(terms::<P>);
        let panel = &mut panel[..height * width];
        P::decode_down::<T>(weight, bodies, rows.clone(), columns.clone(), panel);
        let (grad, next) = grad.terms[start * tokens..].split_at(height * tokens);
        // What comes next is fetched in equal parts.
        let mut next = next[..next.len().min(grad.len())].chunks(grad.len() * sliver / width + 1);
        let slivers = panel.chunks(height * sliver).zip(sums.chunks_mut(tokens * sliver));
        for (panel, sums) in slivers {
            let next = next.next().unwrap_or_default();
            (products.nn)(grad, panel, panel.len() / height, sums, next);
        }
    }
    if let Some((g, a, rank)) = adapter {
        let mut panel = Scratch::<f32>::new(rank * sliver);
        for (i, sums) in sums.chunks_mut(tokens * sliver).enumerate() {
            let first = columns.start + i * sliver;
            let columns = first..(first + sliver).min(columns.end);
            let panel = &mut panel[..rank * columns.len()];
            copy_columns(a, weight.cols, &columns, panel);
            (bodies.floats.nn)(g, panel, columns.len(), sums, &[]);
        }
    }
    for (token, row) in strip.rows.into_iter().enumerate() {
        for (sums, to) in sums.chunks(tokens * sliver).zip(row.chunks_mut(sliver)) {
            (bodies.round)(&sums[token * to.len()..][..to.len()], T::values_mut(to));
        }
    }
}

/// Some columns of a matrix.
pub(crate) fn copy_columns(from: &[f32], cols: usize, columns: &Range<usize>, to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(columns.len()).zip(from.chunks_exact(cols)) {
        to.copy_from_slice(&from[columns.clone()]);
    }
}
