//! Products of a few tokens with packed weights, at the speed at which memory gives their bytes.
//!
//! ```text
//! exact    y[n] = sum over blocks b of  scale[n, b] * (sum over k in b of  value[code] * x[k])
//! int8     the inner sums in integers (see [`int8`])
//! ```
//!
//! Sums are in fp32; no weight is ever rounded to 16 bits. What depends on x alone is computed once a
//! call: each body has x in the order in which it decodes. Rows of W must be whole blocks. A token
//! gives the same bytes alone and among others.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod int8;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(test)]
mod samples;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod scales_avx512;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::linear::epilogue::Epilogue;
use crate::linear::forward::Compute;
use crate::linear::matvec::int8::Rounded;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::simd::Engine;
use crate::values::Element;

/// Tokens that are multiplied with a code when it is decoded.
pub(crate) const MAX_TOKENS: usize = 4;

/// Rows of W that a thread takes at a time.
const STRIP: usize = 64;

/// The products of one instruction set.
#[derive(Debug)]
pub(crate) struct Matvec {
    /// The tokens, (M, cols), in the order that `exact` takes.
    pub(crate) arrange: for<'a> fn(&'a [f32], &Weight<'_>) -> Cow<'a, [f32]>,
    /// Weight, rows of it, tokens in order -> sums, (M, rows).
    pub(crate) exact: fn(&Weight<'_>, Range<usize>, &[f32], &mut [f32]),
    /// Weight, rows of it, rounded tokens -> sums, (M, rows).
    pub(crate) int8: fn(&Weight<'_>, Range<usize>, &Rounded, &mut [f32]),
}

/// The tokens of a call, ready for a body.
enum Input<'a> {
    Exact(Cow<'a, [f32]>),
    Int8(Rounded),
}

/// Whether [`multiply`] takes so many tokens and this weight.
pub(crate) fn serves(tokens: usize, weight: &Weight<'_>) -> bool {
    (1..=MAX_TOKENS).contains(&tokens) && weight.cols > 0 && weight.rows_are_blocks()
}

/// Computes strip by strip, in parallel.
pub(crate) fn multiply<T: Element>(
    engine: Engine,
    x: &[f32],
    weight: &Weight<'_>,
    compute: Compute,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let tokens = y.len() / weight.rows;
    let body = engine.bodies.matvec;
    let input = in_default_float_env(|| match compute {
        Compute::Int8 if int8::serves(weight) => {
            Input::Int8(Rounded::new(engine.bodies, x, weight))
        }
        _ => Input::Exact((body.arrange)(x, weight)),
    });
    let jobs = strips::split(y, weight.rows, STRIP).into_iter();
    parallel::for_each(weight.rows * weight.cols / 4, engine, jobs, |strip: Strip<'_, T>| {
        let rows = strip.columns.clone();
        let mut room = [0.0; MAX_TOKENS * STRIP];
        let sums = &mut room[..tokens * rows.len()];
        match &input {
            Input::Exact(x) => (body.exact)(weight, rows, x, sums),
            Input::Int8(x) => (body.int8)(weight, rows, x, sums),
        }
        epilogue.finish(strip, sums);
    })
}

/// The values of each of M tokens.
pub(crate) fn by_token<T, const M: usize>(x: &[T]) -> [&[T]; M] {
    let a_token = x.len() / M;
    core::array::from_fn(|m| &x[m * a_token..(m + 1) * a_token])
}
