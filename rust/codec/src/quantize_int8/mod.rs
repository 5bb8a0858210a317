//! int8 quantization: symmetric, `-127..=127`, one absmax a block.
//!
//! ```text
//! a      = max |x| of the block, stored as it is
//! factor = 127 / a, a true fp32 division; 0 if a < 1e-36 (127 / a would overflow)
//! code   = x * factor in fp32, rounded half to even
//! ```
//!
//! `|x * factor|` stays below 127.5: `factor` is a normal float within half an ulp of `127 / a`.

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

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_blocksize, check_len, num_blocks};
use crate::parallel::{self, JOB};
use crate::simd::Engine;
use crate::values::{with_slice, NonFinite, Stores, Values};

/// Blocks whose absmax is below this are coded as zeros.
pub(crate) const SMALLEST: f32 = 1e-36;

/// Quantizes `values` to 8-bit integers in `codes` and one scale a block in `absmax`.
///
/// With [`NonFinite::Keep`] a block that holds NaN or infinity gets that absmax and codes of 0.
///
/// # Errors
/// [`CodecError::Blocksize`], [`CodecError::Length`], [`CodecError::Interrupted`], and
/// [`CodecError::NonFinite`] unless `nonfinite` is [`NonFinite::Keep`]; the outputs are then
/// unspecified.
pub fn quantize_int8(
    engine: Engine,
    values: Values<'_>,
    blocksize: usize,
    nonfinite: NonFinite,
    codes: &mut [i8],
    absmax: &mut [f32],
) -> Result<(), CodecError> {
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("packed", codes.len(), len, (len, "values"))?;
    check_len("absmax", absmax.len(), num_blocks(len, blocksize), (len, "values"))?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (codes, tail_codes) = codes.split_at_mut(whole);
    let (absmax, tail_absmax) = absmax.split_at_mut(whole / blocksize);

    let stores = Stores::for_bytes(codes.len());
    let finite = AtomicBool::new(true);
    let outputs = codes.chunks_mut(JOB).zip(absmax.chunks_mut(JOB / blocksize));
    parallel::for_each(whole, engine, blocks.chunks(JOB).zip(outputs), |(v, (q, a))| {
        if !(engine.bodies.quantize_int8)(v, blocksize, stores, q, a) {
            finite.store(false, Ordering::Relaxed);
        }
    })?;
    if let [absmax] = tail_absmax {
        in_default_float_env(|| {
            with_slice!(tail, Values, v => scalar::quantize_block(v, tail_codes, absmax));
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

/// What the values of a block are multiplied by.
pub(crate) fn factor(absmax: f32) -> f32 {
    if absmax < SMALLEST {
        0.0
    } else {
        127.0 / absmax
    }
}
