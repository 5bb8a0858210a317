//! int8 quantization by rows of any length: the codes and scales of bitsandbytes' int8 files.
//!
//! ```text
//! a      = max |x| of the row, stored as it is
//! factor = 127 * (1 / a), both operations rounded to fp32; 0 if a < 1e-36 (it would overflow)
//! code   = x * factor in fp32, rounded half to even
//! ```
//!
//! bitsandbytes' CPU back end computes the factor in these two steps. The quotient `127 / a` of
//! int8 blocks differs from it in an ulp now and then, and with it one code in some thousands.
//! `|x * factor|` stays below 127.5: `factor` is within two ulps of `127 / a`, or, where `1 / a` is
//! subnormal, within a millionth of it.

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
use crate::layout::{check_len, check_row, num_blocks};
use crate::parallel::{self, JOB};
use crate::quantize_int8::SMALLEST;
use crate::simd::Engine;
use crate::values::{NonFinite, Values};

/// Quantizes rows of `row` values, the last of which may be shorter, to 8-bit integers in `codes`
/// and one scale a row in `absmax`.
///
/// With [`NonFinite::Keep`] a row that holds NaN or infinity gets that absmax and codes of 0.
///
/// # Errors
/// [`CodecError::Row`], [`CodecError::Length`], [`CodecError::Interrupted`], and
/// [`CodecError::NonFinite`] unless `nonfinite` is [`NonFinite::Keep`]; the outputs are then
/// unspecified.
pub fn quantize_int8_rows(
    engine: Engine,
    values: Values<'_>,
    row: usize,
    nonfinite: NonFinite,
    codes: &mut [i8],
    absmax: &mut [f32],
) -> Result<(), CodecError> {
    check_row(row)?;
    let len = values.len();
    check_len("packed", codes.len(), len, (len, "values"))?;
    check_len("absmax", absmax.len(), num_blocks(len, row), (len, "values"))?;

    let rows = (JOB / row).max(1);
    let finite = AtomicBool::new(true);
    let outputs = codes.chunks_mut(rows * row).zip(absmax.chunks_mut(rows));
    let jobs = values.chunks(rows * row).zip(outputs);
    parallel::for_each(len, engine, jobs, |(values, (codes, absmax))| {
        let outputs = codes.chunks_mut(row).zip(absmax);
        for (values, (codes, absmax)) in values.chunks(row).zip(outputs) {
            *absmax = (engine.bodies.quantize_int8_row)(values, codes);
            if !absmax.is_finite() {
                finite.store(false, Ordering::Relaxed);
            }
        }
    })?;
    if nonfinite == NonFinite::Error && !finite.into_inner() {
        return Err(values.nonfinite_error(engine));
    }
    Ok(())
}

/// What the values of a row are multiplied by.
pub(crate) fn factor(absmax: f32) -> f32 {
    if absmax < SMALLEST {
        0.0
    } else {
        127.0 * (1.0 / absmax)
    }
}
