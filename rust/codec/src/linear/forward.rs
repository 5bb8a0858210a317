//! `y = x W^T + h B^T + bias`.

use crate::error::CodecError;
use crate::layout::check_len;
use crate::linear::matvec;
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
    /// x rounded to 8 bits, and codes as integers where this is faster: up to four tokens. Each 64
    /// values of x share a scale, so one large value costs its neighbours precision. The relative
    /// error (root mean square) on Gaussian values is 5.5e-3, with every 512th value 50 times as
    /// large 1.8e-2; that of NF4 codes is 9e-2.
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
    y: ValuesMut<'_>,
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
    let x = widened(x);
    let epilogue = Epilogue::new(engine, &x, weight, bias, lora)?;
    if matvec::serves(tokens, weight) {
        return with_slice!(y, ValuesMut, y => {
            matvec::multiply(engine, &x, weight, compute, &epilogue, y)
        });
    }
    with_slice!(y, ValuesMut, y => strips_of(engine, &x, weight, &epilogue, y))
}

/// The values as floats.
fn widened(values: Values<'_>) -> Vec<f32> {
    let mut floats = vec![0.0; values.len()];
    with_slice!(values, Values, v => Element::widen(v, &mut floats));
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
        epilogue.finish(engine.bodies, strip, &mut sums);
    })
}

/// What is added to the product before it is rounded.
pub(crate) struct Epilogue<'a> {
    bias: Option<&'a [f32]>,
    /// `scaling * x A^T`, (M, rank), and B, (rows, rank).
    lora: Option<(Vec<f32>, &'a [f32], usize)>,
}

impl<'a> Epilogue<'a> {
    pub(crate) fn new(
        engine: Engine,
        x: &[f32],
        weight: &Weight<'_>,
        bias: Option<&'a [f32]>,
        lora: Option<Lora<'a>>,
    ) -> Result<Self, CodecError> {
        let lora = lora.filter(|lora| lora.rank > 0 && weight.cols > 0);
        let lora = lora.map(|Lora { a, b, rank, scaling }| {
            let tokens = x.len() / weight.cols;
            let mut h = vec![0.0; tokens * rank];
            (engine.bodies.matmul_nt)(x, a, weight.cols, &mut h);
            h.iter_mut().for_each(|h| *h *= scaling);
            (h, b, rank)
        });
        Ok(Self { bias, lora })
    }

    /// Adds to the sums of a strip, (M, columns), and writes it.
    pub(crate) fn finish<T: Element>(
        &self,
        bodies: &'static Bodies,
        strip: Strip<'_, T>,
        sums: &mut [f32],
    ) {
        let width = strip.columns.len();
        if let Some((h, b, rank)) = &self.lora {
            let b = &b[strip.columns.start * rank..strip.columns.end * rank];
            let transposed: Vec<f32> =
                (0..*rank).flat_map(|r| b.iter().skip(r).step_by(*rank).copied()).collect();
            (bodies.matmul_nn)(h, &transposed, width, sums);
        }
        for (row, sums) in strip.rows.into_iter().zip(sums.chunks_mut(width.max(1))) {
            if let Some(bias) = self.bias {
                let bias = &bias[strip.columns.clone()];
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
            T::narrow(sums, row);
        }
    }
}
