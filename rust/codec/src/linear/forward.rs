//! `y = x W^T + h B^T + bias`.

use half::bf16;

use crate::error::CodecError;
use crate::layout::check_len;
use crate::linear::adapter::{Factors, Lora};
use crate::linear::dense;
use crate::linear::epilogue::Epilogue;
use crate::linear::matvec;
use crate::linear::weight::Weight;
use crate::simd::Engine;
use crate::values::{with_slice, Element, Values, ValuesMut};

/// What is multiplied with what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// The weight that `dequantize` gives in the dtype of x, sums in fp32.
    #[default]
    Exact,
    /// x rounded to 8 bits, and W where this is faster; as `Exact` where no body has such products, and
    /// for so few tokens in bfloat16 that its products are as fast.
    ///
    /// One token has a scale for each 64 values, a relative error (root mean square) of 5.5e-3 on
    /// Gaussian values, 1.8e-2 with every 512th value 50 times as large. More tokens on tiles, and
    /// three or more in AVX-512, have one scale each, and W one for each 1024 columns of a row:
    /// 1.2e-2 on Gaussian values. That of NF4 codes is 9e-2.
    Int8,
}

/// What tiles multiply W with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TileInput<'a> {
    /// x as it is.
    Bf16(&'a [bf16]),
    /// x to be rounded to 8 bits, as W will be.
    Int8(Values<'a>),
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
    if weight.rows == 0 {
        return Ok(());
    }
    let lora = lora.map(|lora| lora.factors(engine.bodies));
    let lora = lora.as_ref();
    if let (true, Some(tiles)) = (tokens > 1 && weight.cols > 0, engine.bodies.tiles) {
        let product = match (compute, x) {
            (Compute::Exact, Values::Bf16(x)) => Some(TileInput::Bf16(x)),
            (Compute::Int8, x) => Some(TileInput::Int8(x)),
            _ => None,
        };
        if let Some(product) = product {
            let epilogue = Epilogue::new(engine, x, weight, bias, lora)?;
            return (tiles.forward)(engine, product, weight, &epilogue, y);
        }
    }
    let int8 = engine.bodies.int8.filter(|_| compute == Compute::Int8 && weight.cols > 0);
    let pairs = engine.bodies.pairs.filter(|_| matches!(x, Values::Bf16(_)));
    if matvec::serves(engine.bodies, tokens, x, weight, compute) {
        let epilogue = Epilogue::new(engine, x, weight, bias, lora)?;
        return with_slice!(y, ValuesMut, y => {
            matvec::multiply(engine, x, weight, compute, &epilogue, y)
        });
    }
    with_slice!(y, ValuesMut, y => {
        by_blocks(engine, x, weight, bias, lora, y, |x, epilogue, y| {
            match (int8, pairs) {
                (Some(int8), _) => int8(engine, x, weight, epilogue, Element::values_mut(y)),
                (_, Some(pairs)) => dense::forward::run(engine, pairs, x, weight, epilogue, y),
                _ => dense::forward::run(engine, engine.bodies.floats, x, weight, epilogue, y),
            }
        })
    })
}

/// Some tokens at a time: `run` takes them, what is added to their products, and their rows of y.
fn by_blocks<T: Element>(
    engine: Engine,
    x: Values<'_>,
    weight: &Weight<'_>,
    bias: Option<&[f32]>,
    lora: Option<&Factors<'_>>,
    y: &mut [T],
    run: impl Fn(Values<'_>, &Epilogue<'_>, &mut [T]) -> Result<(), CodecError>,
) -> Result<(), CodecError> {
    for (block, y) in y.chunks_mut(dense::forward::TOKENS * weight.rows).enumerate() {
        let first = block * dense::forward::TOKENS * weight.cols;
        let x = x.range(first..first + y.len() / weight.rows * weight.cols);
        run(x, &Epilogue::new(engine, x, weight, bias, lora)?, y)?;
    }
    Ok(())
}
