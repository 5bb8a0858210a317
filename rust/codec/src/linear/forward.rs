//! `y = x W^T + h B^T + bias`.

use crate::error::CodecError;
use crate::layout::check_len;
use crate::linear::epilogue::Epilogue;
use crate::linear::scratch::Scratch;
use crate::linear::strips::{self, Strip};
use crate::linear::weight::Weight;
use crate::parallel;
use crate::simd::{Bodies, Engine};
use crate::values::{with_slice, Element, Values, ValuesMut};

/// Rows of W that a thread takes at a time.
const STRIP: usize = 64;

/// A low-rank adapter: `scaling * (x A^T) B^T` is added to the product.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// (rank, cols) of the weight.
    pub a: &'a [f32],
    /// (rows of the weight, rank).
    pub b: &'a [f32],
    /// The rank.
    pub rank: usize,
    /// The factor.
    pub scaling: f32,
}

impl Lora<'_> {
    pub(crate) fn check(&self, weight: &Weight<'_>) -> Result<(), CodecError> {
        let Self { a, b, rank, .. } = *self;
        let sizes = [("lora_A", a.len(), weight.cols), ("lora_B", b.len(), weight.rows)];
        for (what, found, features) in sizes {
            let expected = rank.checked_mul(features).ok_or(CodecError::Row)?;
            check_len(what, found, expected, (features, "features"))?;
        }
        Ok(())
    }
}

/// What is multiplied with what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// The weight that `dequantize` gives in the dtype of x, sums in fp32.
    #[default]
    Exact,
    /// x rounded to 8 bits, and codes as integers where this is faster: an error of about a
    /// hundredth, smaller than that of 4-bit codes.
    Int8,
}

/// Writes `y = x W^T + bias`, and the adapter's part if there is one.
///
/// `x` is (M, `weight.cols`), `y` (M, `weight.rows`), `bias` one value a row of the weight.
///
/// # Errors
/// [`CodecError::Length`], [`CodecError::Shape`], [`CodecError::Blocksize`],
/// [`CodecError::TableNotFinite`] and [`CodecError::Interrupted`].
pub fn linear(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    bias: Option<&[f32]>,
    lora: Option<Lora<'_>>,
    compute: Compute,
    mut y: ValuesMut<'_>,
) -> Result<(), CodecError> {
    weight.check()?;
    lora.map_or(Ok(()), |lora| lora.check(weight))?;
    let tokens = y.len().checked_div(weight.rows).unwrap_or(0);
    check_len("y", y.len(), tokens * weight.rows, (tokens, "tokens"))?;
    if weight.rows > 0 {
        check_len("x", x.len(), tokens * weight.cols, (tokens, "tokens"))?;
    }
    if let Some(bias) = bias {
        check_len("bias", bias.len(), weight.rows, (weight.rows, "out-features"))?;
    }
    let epilogue = Epilogue::new(engine, x, weight, bias, lora);
    #[cfg(target_arch = "x86_64")]
    if let (Values::Bf16(x), ValuesMut::Bf16(y), Some(forward)) =
        (x, &mut y, engine.bodies.forward_bf16)
    {
        if compute == Compute::Exact && tokens > 1 && weight.cols > 0 {
            return forward(engine, x, weight, &epilogue, y);
        }
    }
    if let (Compute::Int8, Some(forward)) = (compute, engine.bodies.forward_int8) {
        if tokens > 1 && weight.cols > 0 {
            return forward(engine, x, weight, &epilogue, y);
        }
    }
    let x = widened(engine.bodies, x);
    with_slice!(y, ValuesMut, y => strips_of(engine, &x, weight, &epilogue, y))
}

/// The values as floats.
pub(crate) fn widened(bodies: &'static Bodies, values: Values<'_>) -> Scratch<f32> {
    let mut floats = Scratch::new(values.len());
    (bodies.widen)(values, &mut floats);
    floats
}

/// Computes strip by strip, in parallel.
fn strips_of<T: Element>(
    engine: Engine,
    x: &[f32],
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let tokens = y.len().checked_div(weight.rows).unwrap_or(0);
    let work = weight.rows * weight.cols * tokens.div_ceil(4);
    let jobs = strips::split(y, weight.rows, STRIP).into_iter();
    parallel::for_each(work, engine, jobs, |strip: Strip<'_, T>| {
        let rows = strip.columns.clone();
        let mut sums = vec![0.0; tokens * rows.len()];
        let mut panel = vec![T::ZERO; rows.len() * weight.cols];
        weight.dequantize_rows(engine.bodies, rows, T::values_mut(&mut panel));
        let mut room = vec![0.0; panel.len()];
        let panel = T::widened(&panel, &mut room);
        (engine.bodies.matmul_nt)(x, panel, weight.cols, &mut sums);
        epilogue.finish(strip, &mut sums);
    })
}
