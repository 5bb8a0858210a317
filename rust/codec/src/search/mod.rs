//! Scales of least squared error for 4-bit codes: the search behind `method="search"`.
//!
//! A scale may be smaller or larger than the block's absmax, and negative where the table is not
//! symmetric. Each of a number of trial scales gives codes, and these a scale that fits them best by
//! least squares. No block gets worse than by its absmax.
//!
//! There are two ways: [`bytes`] tries in integers, three times as fast; [`general`] in fp32, with
//! importance and for any table.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod bytes;
mod general;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::codebook::Codebook;
use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_blocksize, check_len, num_blocks};
use crate::parallel::{self, JOB};
use crate::quantize::scalar::at_least_smallest;
use crate::search::bytes::Plan;
use crate::simd::Engine;
use crate::values::{NonFinite, Values};

/// Blocks with a smaller absmax keep it: their arithmetic would be subnormal.
const SMALLEST: f32 = 1e-36;

/// Weights of the squared errors, one a column of the matrix that the values are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Importance<'a> {
    /// Finite and not negative, at most 1.
    columns: &'a [f32],
    /// Column of the first value.
    first: usize,
}

/// How the scales of blocks are found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'a> {
    /// See [`bytes`].
    Bytes(&'a Plan),
    /// See [`general`].
    General(Option<Importance<'a>>),
}

/// Finds one scale a block, for [`crate::encode_4bit`], with the least squared error that its trials find.
///
/// `importance`, one weight a column, weighs the squared errors; values are rows of as many
/// columns. It must be finite and not negative. A block that holds NaN or infinity gets that as
/// its scale.
///
/// # Errors
/// [`CodecError::Blocksize`], [`CodecError::Length`], [`CodecError::Importance`],
/// [`CodecError::Columns`],
/// [`CodecError::Interrupted`], and [`CodecError::NonFinite`] unless `nonfinite` is [`NonFinite::Keep`]; the scales are then
/// unspecified.
pub fn search_scales(
    engine: Engine,
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    importance: Option<&[f32]>,
    nonfinite: NonFinite,
    scales: &mut [f32],
) -> Result<(), CodecError> {
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("absmax", scales.len(), num_blocks(len, blocksize), (len, "values"))?;
    let columns = importance.map(|weights| normalised(weights, len)).transpose()?;
    let columns = columns.filter(|columns| columns.iter().any(|w| *w != 1.0));
    let plan = if columns.is_some() { None } else { Plan::new(code, blocksize) };
    let way = |first| match (&plan, &columns) {
        (Some(plan), _) => Way::Bytes(plan),
        (None, Some(columns)) => {
            Way::General(Some(Importance { columns, first: first % columns.len() }))
        }
        (None, None) => Way::General(None),
    };

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (scales, tail_scale) = scales.split_at_mut(whole / blocksize);

    let finite = AtomicBool::new(true);
    let jobs = blocks.chunks(JOB).zip(scales.chunks_mut(JOB / blocksize)).enumerate();
    parallel::for_each(whole, engine, jobs, |(job, (v, s))| {
        if !(engine.bodies.search_scales)(v, code, blocksize, way(job * JOB), s) {
            finite.store(false, Ordering::Relaxed);
        }
    })?;
    if let [scale] = tail_scale {
        in_default_float_env(|| {
            let found = std::slice::from_mut(scale);
            if !scalar::search(tail, code, tail.len(), way(whole), found) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        *scale = at_least_smallest(*scale); // as the absmax of a ragged block is stored
    }
    if nonfinite == NonFinite::Error && !finite.into_inner() {
        return Err(values.nonfinite_error(engine));
    }
    Ok(())
}

/// Weights divided by the largest, so that their sums neither overflow nor vanish.
fn normalised(weights: &[f32], len: usize) -> Result<Vec<f32>, CodecError> {
    if weights.is_empty() || !len.is_multiple_of(weights.len()) {
        return Err(CodecError::Columns { columns: weights.len(), values: len });
    }
    if let Some(index) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        return Err(CodecError::Importance { index, value: weights[index] });
    }
    let largest = weights.iter().fold(f32::MIN_POSITIVE, |a, &b| a.max(b));
    Ok(weights.iter().map(|w| w / largest).collect())
}

impl Importance<'_> {
    /// The weights of `len` values from place `start`, in `room` if a row ends among them; none
    /// without importance.
    #[inline(always)]
    fn of_block<'a>(
        importance: Option<Importance<'a>>,
        start: usize,
        len: usize,
        room: &'a mut [f32],
    ) -> &'a [f32] {
        let Some(Importance { columns, first }) = importance else { return &[] };
        let column = (first + start) % columns.len();
        if let Some(weights) = columns.get(column..column + len) {
            return weights;
        }
        let endless = columns.iter().cycle().skip(column);
        room[..len].iter_mut().zip(endless).for_each(|(to, from)| *to = *from);
        &room[..len]
    }
}
