//! `y = x W^T + h B^T + bias`.

use crate::error::CodecError;
use crate::layout::check_len;
use crate::linear::dense::tokens::turn;
use crate::linear::strips::Strip;
use crate::linear::weight::Weight;
use crate::linear::{dense, lora};
use crate::simd::{Bodies, Engine};
use crate::values::{with_slice, Element, Values, ValuesMut};

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
    y: ValuesMut<'_>,
) -> Result<(), CodecError> {
    let _ = compute;
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
    if weight.rows == 0 {
        return Ok(());
    }
    with_slice!(y, ValuesMut, y => by_panels(engine, x, weight, bias, lora, y))
}

/// By decoded panels, some tokens at a time.
fn by_panels<T: Element>(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    bias: Option<&[f32]>,
    lora: Option<Lora<'_>>,
    y: &mut [T],
) -> Result<(), CodecError> {
    for (block, y) in y.chunks_mut(dense::forward::TOKENS * weight.rows).enumerate() {
        let first = block * dense::forward::TOKENS * weight.cols;
        let x = x.range(first..first + y.len() / weight.rows * weight.cols);
        let epilogue = Epilogue::new(engine, x, weight, bias, lora)?;
        dense::forward::run(engine, x, weight, &epilogue, y)?;
    }
    Ok(())
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
        x: Values<'_>,
        weight: &Weight<'_>,
        bias: Option<&'a [f32]>,
        lora: Option<Lora<'a>>,
    ) -> Result<Self, CodecError> {
        let lora = lora.filter(|lora| lora.rank > 0 && weight.cols > 0);
        let lora = lora.map(|lora| Ok((lora::down(engine, x, lora)?, lora.b, lora.rank)));
        let lora = lora.transpose()?;
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
            let mut transposed = vec![0.0; b.len()];
            turn(bodies, (b, *rank), (&mut transposed, width), (width, *rank));
            (bodies.matmul_nn)(h, &transposed, width, sums, &[]);
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
