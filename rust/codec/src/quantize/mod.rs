//! 4-bit quantization: values to two codes a byte and one absmax a block.
//!
//! All arithmetic is fp32, and the bytes are those of bitsandbytes' CPU back end:
//!
//! ```text
//! a      = max |x| of the block
//! s      = clamp(x * (1 / max(a, 1e-38)), -1, 1)      whole block, stores a
//! s      = clamp(x / max(a, 1e-38), -1, 1)            ragged last block, stores max(a, 1e-38)
//! code   = order[number of bounds strictly below s]    (a NaN is above all of them)
//! byte i = code(2 i) << 4 | code(2 i + 1)
//! ```

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::codebook::Codebook;
use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_blocksize, check_len, num_blocks, packed_len};
use crate::parallel::{self, JOB};
use crate::simd::Engine;
use crate::values::{with_slice, NonFinite, Values};

/// Smallest divisor of a block, bitsandbytes' guard against division by zero. A subnormal.
pub(crate) const SMALLEST: f32 = 1e-38;

/// Quantizes `values` to 4-bit codes in `packed` and one scale a block in `absmax`.
///
/// # Errors
/// [`CodecError::Blocksize`], [`CodecError::Length`], [`CodecError::Interrupted`], and
/// [`CodecError::NonFinite`] unless `nonfinite` is [`NonFinite::Keep`]; the outputs are then
/// unspecified.
pub fn quantize_4bit(
    engine: Engine,
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    nonfinite: NonFinite,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), CodecError> {
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("packed", packed.len(), packed_len(len), (len, "values"))?;
    check_len("absmax", absmax.len(), num_blocks(len, blocksize), (len, "values"))?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (packed, tail_packed) = packed.split_at_mut(whole / 2);
    let (absmax, tail_absmax) = absmax.split_at_mut(whole / blocksize);

    let finite = AtomicBool::new(true);
    let outputs = packed.chunks_mut(JOB / 2).zip(absmax.chunks_mut(JOB / blocksize));
    parallel::for_each(whole, engine, blocks.chunks(JOB).zip(outputs), |(v, (p, a))| {
        if !(engine.bodies.quantize_4bit)(v, code, blocksize, p, a) {
            finite.store(false, Ordering::Relaxed);
        }
    })?;
    if let [absmax] = tail_absmax {
        in_default_float_env(|| {
            with_slice!(tail, Values, v => scalar::quantize_tail(v, code, tail_packed, absmax));
        });
        if !absmax.is_finite() {
            finite.store(false, Ordering::Relaxed);
        }
    }
    if nonfinite == NonFinite::Error && !finite.into_inner() {
        return Err(values.nonfinite_error(engine));
    }
    Ok(())
}

/// Codes `values` against `scales`, one a block, of any sign; writes `packed`.
///
/// The codes are those of [`quantize_4bit`] where a scale is the block's absmax. Where it is NaN or
/// infinite the codes mean nothing, and so will the decoded block.
///
/// # Errors
/// [`CodecError::Blocksize`], [`CodecError::Length`] and [`CodecError::Interrupted`].
pub fn encode_4bit(
    engine: Engine,
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    scales: &[f32],
    packed: &mut [u8],
) -> Result<(), CodecError> {
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("packed", packed.len(), packed_len(len), (len, "values"))?;
    check_len("absmax", scales.len(), num_blocks(len, blocksize), (len, "values"))?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (packed, tail_packed) = packed.split_at_mut(whole / 2);
    let (scales, tail_scale) = scales.split_at(whole / blocksize);

    let jobs = scales.chunks(JOB / blocksize).zip(packed.chunks_mut(JOB / 2));
    parallel::for_each(whole, engine, blocks.chunks(JOB).zip(jobs), |(v, (s, p))| {
        (engine.bodies.encode_4bit)(v, code, blocksize, s, p);
    })?;
    if let [scale] = tail_scale {
        in_default_float_env(|| {
            with_slice!(tail, Values, v => scalar::encode_tail(v, code, *scale, tail_packed));
        });
    }
    Ok(())
}
