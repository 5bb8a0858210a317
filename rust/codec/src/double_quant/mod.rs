//! Double quantization: scales in 8 bits, relative to their mean, in groups of 256.
//!
//! ```text
//! offset     = mean of absmax, summed in f64 in a fixed order (per group, then over groups);
//!              0 if one is negative: scales of both signs lie around it
//! r          = absmax - offset
//! nested     = max |r| of the group
//! code       = place of the value nearest to r / nested; a tie goes to the lower value
//! absmax'    = fp32(fp32(table[code] * nested) + offset)
//! ```

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod scalar;
pub(crate) mod search;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::check_len;
use crate::parallel;
use crate::scales::Scales;
use crate::simd::Engine;
use search::Search;

/// Scales that share a second-level scale.
pub const NESTED_BLOCKSIZE: usize = 256;

/// Scales in a job of coding, which takes some 32 times as long as to code as many values.
const ENCODE_JOB: usize = parallel::JOB / 32;
/// Scales in a job of reading or adding them; as all jobs, whole fours of groups.
const DECODE_JOB: usize = parallel::JOB / 8;

/// What [`quantize_absmax`] finds out beside codes and second-level scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NestedScales {
    /// Mean of the scales, to be added when decoding.
    pub offset: f32,
    /// Whether every scale of a block that is not all zeros survives: the decoded one has its
    /// sign and is at most 1/8 of its magnitude away.
    pub safe: bool,
}

/// Codes the scales of a tensor in 8 bits.
///
/// `table` holds 256 ascending values, `codes` one entry a scale, `nested` one a group.
///
/// # Errors
/// [`CodecError::Length`], [`CodecError::TableNotAscending`] and [`CodecError::Interrupted`].
pub fn quantize_absmax(
    engine: Engine,
    absmax: &[f32],
    table: &[f32; 256],
    codes: &mut [u8],
    nested: &mut [f32],
) -> Result<NestedScales, CodecError> {
    let len = absmax.len();
    check_len("codes", codes.len(), len, (len, "scales"))?;
    check_len("nested_absmax", nested.len(), len.div_ceil(NESTED_BLOCKSIZE), (len, "scales"))?;
    let search = prepare(table)?;

    let offset = offset(engine, absmax)?;
    let safe = AtomicBool::new(true);
    let outputs =
        codes.chunks_mut(ENCODE_JOB).zip(nested.chunks_mut(ENCODE_JOB / NESTED_BLOCKSIZE));
    let jobs = absmax.chunks(ENCODE_JOB).zip(outputs);
    parallel::for_each(work(len, ENCODE_JOB), engine, jobs, |(absmax, (codes, nested))| {
        let whole = absmax.len() / NESTED_BLOCKSIZE * NESTED_BLOCKSIZE;
        let (groups, tail) = absmax.split_at(whole);
        let (codes, tail_codes) = codes.split_at_mut(whole);
        let (nested, tail_nested) = nested.split_at_mut(whole / NESTED_BLOCKSIZE);
        let groups = (engine.bodies.quantize_scales)(groups, offset, &search, codes, nested);
        let tail = scalar::quantize(tail, offset, &search, tail_codes, tail_nested);
        if !(groups && tail) {
            safe.store(false, Ordering::Relaxed);
        }
    })?;
    Ok(NestedScales { offset, safe: safe.into_inner() })
}

/// Writes the scales that [`quantize_absmax`] coded.
///
/// # Errors
/// [`CodecError::Length`] and [`CodecError::Interrupted`].
pub fn dequantize_absmax(
    engine: Engine,
    codes: &[u8],
    table: &[f32; 256],
    nested: &[f32],
    offset: f32,
    absmax: &mut [f32],
) -> Result<(), CodecError> {
    let len = absmax.len();
    check_len("codes", codes.len(), len, (len, "scales"))?;
    check_len("nested_absmax", nested.len(), len.div_ceil(NESTED_BLOCKSIZE), (len, "scales"))?;
    let scales = Scales::Nested { codes, table, nested, offset };
    let jobs = absmax.chunks_mut(DECODE_JOB).enumerate();
    parallel::for_each(work(len, DECODE_JOB), engine, jobs, |(job, absmax)| {
        (engine.bodies.write_scales)(&scales, job * DECODE_JOB, absmax);
    })
}

/// The number of values that are as much work as `len` scales in jobs of `job`.
fn work(len: usize, job: usize) -> usize {
    len.saturating_mul(parallel::JOB / job)
}

/// Two roundings: Rust never fuses a product and a sum.
pub(crate) fn decode(table: &[f32; 256], code: u8, nested: f32, offset: f32) -> f32 {
    table[usize::from(code)] * nested + offset
}

/// What is taken off the scales: small ones of both signs keep their precision if it is nothing.
///
/// The mean is the sum of each group, then of these: the same for any number of threads.
fn offset(engine: Engine, absmax: &[f32]) -> Result<f32, CodecError> {
    if absmax.is_empty() {
        return Ok(0.0);
    }
    let negative = AtomicBool::new(false);
    let mut sums = vec![0.0_f64; absmax.len().div_ceil(NESTED_BLOCKSIZE)];
    let jobs = absmax.chunks(DECODE_JOB).zip(sums.chunks_mut(DECODE_JOB / NESTED_BLOCKSIZE));
    parallel::for_each(work(absmax.len(), DECODE_JOB), engine, jobs, |(absmax, sums)| {
        group_sums(absmax, sums);
        // Counted, not asked with `any`, and in lanes as wide as scales: this runs in vectors.
        if absmax.iter().map(|&scale| u32::from(scale < 0.0)).sum::<u32>() > 0 {
            negative.store(true, Ordering::Relaxed);
        }
    })?;
    if negative.into_inner() {
        return Ok(0.0);
    }
    Ok(in_default_float_env(|| {
        let total = sums.into_iter().fold(0.0, |total, sum| total + sum);
        (total / absmax.len() as f64) as f32
    }))
}

/// Writes the sum of each group.
fn group_sums(absmax: &[f32], sums: &mut [f64]) {
    // Groups side by side: each sum is a chain of additions that must wait for each other.
    const SIDE: usize = 8;
    let sides = absmax.as_chunks::<{ SIDE * NESTED_BLOCKSIZE }>().0;
    let (sums_of_sides, rest_sums) = sums.split_at_mut(SIDE * sides.len());
    for (side, sums) in sides.iter().zip(sums_of_sides.as_chunks_mut::<SIDE>().0) {
        let groups = side.as_chunks::<NESTED_BLOCKSIZE>().0;
        *sums = [0.0; SIDE];
        for i in 0..NESTED_BLOCKSIZE {
            for (sum, group) in sums.iter_mut().zip(groups) {
                *sum += f64::from(group[i]);
            }
        }
    }
    let rest = absmax[sides.len() * SIDE * NESTED_BLOCKSIZE..].chunks(NESTED_BLOCKSIZE);
    for (group, sum) in rest.zip(rest_sums) {
        *sum = group.iter().fold(0.0, |sum, &a| sum + f64::from(a));
    }
}

/// The bounds between 256 ascending values.
fn prepare(table: &[f32; 256]) -> Result<Search, CodecError> {
    let wrong = |i: &usize| !table[*i].is_finite() || (*i > 0 && table[i - 1] > table[*i]);
    if let Some(index) = (0..table.len()).find(wrong) {
        return Err(CodecError::TableNotAscending { index });
    }
    let bounds: [f32; 255] = core::array::from_fn(|i| (table[i] + table[i + 1]) / 2.0);
    Ok(Search::new(table, &bounds))
}
