//! int8 dequantization: `fp32(code * fp32(absmax * fp32(1 / 127)))`, then one rounding to the
//! output dtype.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_len, check_row};
use crate::parallel::{self, JOB};
use crate::scales::Scales;
use crate::simd::{Bodies, Engine};
use crate::values::{plain_nan, with_slice, Stores, ValuesMut};

/// fp32(1 / 127), bitsandbytes' constant.
pub(crate) const STEP: f32 = 7.874015718698502e-3;

/// The SIMD bodies take blocks of a multiple of this many values.
const STRIP: usize = 32;

/// Writes the values of 8-bit `codes` with one scale a block, in 8 bits too or in fp32.
///
/// A block may have any length: a row of a matrix is one too.
///
/// # Errors
/// [`CodecError::Row`], [`CodecError::Length`] and [`CodecError::Interrupted`].
pub fn dequantize_int8<'a>(
    engine: Engine,
    codes: &[i8],
    scales: impl Into<Scales<'a>>,
    blocksize: usize,
    values: ValuesMut<'_>,
    stores: Stores,
) -> Result<(), CodecError> {
    check_row(blocksize)?;
    let len = values.len();
    check_len("packed", codes.len(), len, (len, "values"))?;
    let scales = scales.into();
    scales.check(len, blocksize)?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (codes, tail_codes) = codes.split_at(whole);

    let count = (JOB / blocksize).max(1);
    let job = count * blocksize;
    let jobs = codes.chunks(job).zip(blocks.chunks(job)).enumerate();
    parallel::for_each(whole, engine, jobs, |(job, (codes, values))| {
        scales.with(engine.bodies, job * count, values.len() / blocksize, |absmax| {
            if blocksize.is_multiple_of(STRIP) {
                (engine.bodies.dequantize_int8)(codes, absmax, blocksize, stores, values);
            } else {
                dequantize_each(engine.bodies, codes, absmax, blocksize, values);
            }
        });
    })?;
    if !tail.is_empty() {
        in_default_float_env(|| {
            scales.with(engine.bodies, whole / blocksize, 1, |absmax| {
                with_slice!(tail, ValuesMut, v => {
                    scalar::dequantize_block(tail_codes, absmax[0], v);
                });
            });
        });
    }
    Ok(())
}

/// Writes the values of whole blocks of any length, one by one: whole strips by the body, the last
/// few by the scalar code.
fn dequantize_each(
    bodies: &Bodies,
    codes: &[i8],
    absmax: &[f32],
    blocksize: usize,
    values: ValuesMut<'_>,
) {
    let whole = blocksize / STRIP * STRIP;
    let stores = Stores::Cached; // the end of a stream, which each call would wait for, costs more
    let inputs = codes.chunks_exact(blocksize).zip(absmax);
    for (values, (codes, absmax)) in values.chunks(blocksize).zip(inputs) {
        let (values, rest) = values.split_at(whole);
        let (codes, rest_codes) = codes.split_at(whole);
        if whole > 0 {
            (bodies.dequantize_int8)(codes, std::slice::from_ref(absmax), whole, stores, values);
        }
        with_slice!(rest, ValuesMut, v => scalar::dequantize_block(rest_codes, *absmax, v));
    }
}

/// What the codes of a block are multiplied by.
pub(crate) fn step(absmax: f32) -> f32 {
    plain_nan(absmax * STEP)
}
