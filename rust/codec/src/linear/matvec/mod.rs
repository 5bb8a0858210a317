//! Products of a few tokens with packed weights, at the speed at which memory gives their bytes.
//!
//! ```text
//! exact    y[n] = sum over blocks b of  scale[n, b] * (sum over k in b of  value[code] * x[k])
//! int8     the inner sums in integers (see [`int8`])
//! ```
//!
//! Sums are in fp32. But for x in bfloat16 where a body has products of that, no weight is ever
//! rounded to 16 bits. What depends on x alone is computed once a call: each body has x in the order
//! in which it decodes. Rows of W must be whole blocks. A token gives the same bytes alone and among
//! up to three others.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod int8;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // bits seen as another type
pub(crate) mod pairs_avx512;
#[cfg(test)]
pub(crate) mod samples;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod scales_avx512;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::linear::adapter::Floats;
use crate::linear::dense::terms::Pair;
use crate::linear::epilogue::Epilogue;
use crate::linear::forward::Compute;
use crate::linear::matvec::int8::Rounded;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::{Bodies, Engine};
use crate::values::{Element, Values};

/// Tokens that are multiplied with a code when it is decoded.
pub(crate) const MAX_TOKENS: usize = 4;
/// The same of any body: room for their sums.
const MOST_TOKENS: usize = 8;

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

/// Products of a few tokens in bfloat16, for [`Weight::chunks_have_scales`].
#[derive(Debug)]
pub(crate) struct PairsMatvec {
    /// Most tokens.
    pub(crate) max_tokens: usize,
    /// The tokens, (M, cols), in the order that `multiply` takes.
    pub(crate) arrange: fn(&[bf16], usize) -> Scratch<Pair>,
    /// Weight, rows of it, tokens in order -> sums, (M, rows).
    pub(crate) multiply: fn(&Weight<'_>, Range<usize>, &[Pair], &mut [f32]),
}

/// The tokens of a call, ready for a body.
enum Input<'a> {
    Exact(Cow<'a, [f32]>),
    Int8(Rounded),
    Pairs(&'static PairsMatvec, Scratch<Pair>),
}

/// Whether [`multiply`] takes so many tokens and this weight.
pub(crate) fn serves(
    bodies: &'static Bodies,
    tokens: usize,
    x: Values<'_>,
    weight: &Weight<'_>,
    compute: Compute,
) -> bool {
    let most = match (pairs(bodies, x, weight), compute) {
        (Some((pairs, _)), _) => pairs.max_tokens,
        (_, Compute::Int8) if bodies.int8.is_some() => int8::FEW,
        _ => MAX_TOKENS,
    };
    (1..=most).contains(&tokens) && weight.cols > 0 && weight.rows_are_blocks()
}

/// The body for pairs, and x as it takes it, where that is how a product is computed: also in place of
/// one in 8 bits, which takes as long.
fn pairs<'a>(
    bodies: &'static Bodies,
    x: Values<'a>,
    weight: &Weight<'_>,
) -> Option<(&'static PairsMatvec, &'a [bf16])> {
    match (x, bodies.matvec_pairs) {
        (Values::Bf16(x), Some(pairs)) if weight.chunks_have_scales() => Some((pairs, x)),
        _ => None,
    }
}

/// Computes strip by strip, in parallel.
pub(crate) fn multiply<T: Element>(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    compute: Compute,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let tokens = y.len() / weight.rows;
    let (bodies, body) = (engine.bodies, engine.bodies.matvec);
    let floats;
    let input = if let Some((pairs, x)) = pairs(bodies, x, weight) {
        Input::Pairs(pairs, (pairs.arrange)(x, weight.cols))
    } else {
        floats = Floats::new(bodies, x);
        in_default_float_env(|| match compute {
            Compute::Int8 if int8::serves(weight) => {
                Input::Int8(Rounded::new(bodies, &floats, weight))
            }
            _ => Input::Exact((body.arrange)(&floats, weight)),
        })
    };
    let jobs = strips::split(y, weight.rows, STRIP).into_iter();
    parallel::for_each(weight.rows * weight.cols / 4, engine, jobs, |strip: Strip<'_, T>| {
        let rows = strip.columns.clone();
        let mut room = [0.0; MOST_TOKENS * STRIP];
        let sums = &mut room[..tokens * rows.len()];
        match &input {
            Input::Exact(x) => (body.exact)(weight, rows, x, sums),
            Input::Int8(x) => (body.int8)(weight, rows, x, sums),
            Input::Pairs(pairs, x) => (pairs.multiply)(weight, rows, x, sums),
        }
        epilogue.finish(strip, sums);
    })
}

/// The values of each of M tokens.
pub(crate) fn by_token<T, const M: usize>(x: &[T]) -> [&[T]; M] {
    let a_token = x.len() / M;
    core::array::from_fn(|m| &x[m * a_token..(m + 1) * a_token])
}
