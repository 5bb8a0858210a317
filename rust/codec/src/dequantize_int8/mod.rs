//! int8 dequantization: `fp32(code * fp32(absmax * fp32(1 / 127)))`, then one rounding to the
//! output dtype.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_blocksize, check_len, num_blocks};
use crate::parallel::{self, JOB};
use crate::simd::Engine;
use crate::values::{plain_nan, with_slice, ValuesMut};

/// fp32(1 / 127), bitsandbytes' constant.
const STEP: f32 = 7.874015718698502e-3;

/// Writes the values of 8-bit `codes` with one scale a block in `absmax`.
///
/// # Errors
/// [`CodecError::Blocksize`], [`CodecError::Length`] and [`CodecError::Interrupted`].
pub fn dequantize_int8(
    engine: Engine,
    codes: &[i8],
    absmax: &[f32],
    blocksize: usize,
    values: ValuesMut<'_>,
) -> Result<(), CodecError> {
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("packed", codes.len(), len, (len, "values"))?;
    check_len("absmax", absmax.len(), num_blocks(len, blocksize), (len, "values"))?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (codes, tail_codes) = codes.split_at(whole);
    let (absmax, tail_absmax) = absmax.split_at(whole / blocksize);

    let inputs = codes.chunks(JOB).zip(absmax.chunks(JOB / blocksize));
    parallel::for_each(whole, engine, inputs.zip(blocks.chunks(JOB)), |((q, a), v)| {
        (engine.bodies.dequantize_int8)(q, a, blocksize, v);
    })?;
    if let &[absmax] = tail_absmax {
        in_default_float_env(|| {
            with_slice!(tail, ValuesMut, v => scalar::dequantize_block(tail_codes, absmax, v));
        });
    }
    Ok(())
}

/// What the codes of a block are multiplied by.
pub(crate) fn step(absmax: f32) -> f32 {
    plain_nan(absmax * STEP)
}
