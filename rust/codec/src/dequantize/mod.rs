//! 4-bit dequantization: `fp32(table[code] * absmax)`, then one rounding to the output dtype.
//!
//! The product depends on the code and the block alone, so bodies scale (and round) the table
//! once a block and look the codes up in it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use crate::codebook::check_table;
use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::{check_blocksize, check_len, packed_len};
use crate::parallel::{self, JOB};
use crate::scales::Scales;
use crate::simd::Engine;
use crate::values::{with_slice, Stores, ValuesMut};

/// Writes the values of 4-bit codes in `packed` with one scale a block.
///
/// Scales may be in 8 bits, and they may be negative, zero, infinite or NaN.
///
/// # Errors
/// [`CodecError::TableNotFinite`], [`CodecError::Blocksize`], [`CodecError::Length`] and
/// [`CodecError::Interrupted`].
pub fn dequantize_4bit<'a>(
    engine: Engine,
    packed: &[u8],
    scales: impl Into<Scales<'a>>,
    table: &[f32; 16],
    blocksize: usize,
    values: ValuesMut<'_>,
    stores: Stores,
) -> Result<(), CodecError> {
    check_table(table)?;
    check_blocksize(blocksize)?;
    let len = values.len();
    check_len("packed", packed.len(), packed_len(len), (len, "values"))?;
    let scales = scales.into();
    scales.check(len, blocksize)?;

    let whole = len / blocksize * blocksize;
    let (blocks, tail) = values.split_at(whole);
    let (packed, tail_packed) = packed.split_at(whole / 2);

    let count = JOB / blocksize;
    let jobs = packed.chunks(JOB / 2).zip(blocks.chunks(JOB)).enumerate();
    parallel::for_each(whole, engine, jobs, |(job, (packed, values))| {
        scales.with(engine.bodies, job * count, values.len() / blocksize, |absmax| {
            (engine.bodies.dequantize_4bit)(packed, absmax, table, blocksize, stores, values);
        });
    })?;
    if !tail.is_empty() {
        in_default_float_env(|| {
            scales.with(engine.bodies, whole / blocksize, 1, |absmax| {
                with_slice!(tail, ValuesMut, v => {
                    scalar::dequantize_block(tail_packed, absmax[0], table, v);
                });
            });
        });
    }
    Ok(())
}
