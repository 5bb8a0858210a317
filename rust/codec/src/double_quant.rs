//! Double quantization: scales in 8 bits, relative to their mean, in groups of 256.
//!
//! ```text
//! offset     = mean of absmax, summed in f64 in a fixed order (per group, then over groups)
//! r          = absmax - offset
//! nested     = max |r| of the group
//! code       = place of the value nearest to r / nested; a tie goes to the lower value
//! absmax'    = fp32(fp32(table[code] * nested) + offset)
//! ```

use crate::error::CodecError;
use crate::layout::check_len;
use crate::parallel;

/// Scales that share a second-level scale.
pub const NESTED_BLOCKSIZE: usize = 256;

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
/// [`CodecError::Length`] and [`CodecError::TableNotAscending`].
pub fn quantize_absmax(
    absmax: &[f32],
    table: &[f32; 256],
    codes: &mut [u8],
    nested: &mut [f32],
) -> Result<NestedScales, CodecError> {
    let len = absmax.len();
    check_len("codes", codes.len(), len, (len, "scales"))?;
    check_len("nested_absmax", nested.len(), len.div_ceil(NESTED_BLOCKSIZE), (len, "scales"))?;
    let search = Search::new(table)?;

    Ok(parallel::alone(|| {
        let offset = mean(absmax);
        let groups = absmax.chunks(NESTED_BLOCKSIZE);
        let outputs = codes.chunks_mut(NESTED_BLOCKSIZE).zip(nested);
        let safe = groups.zip(outputs).fold(true, |safe, (group, (codes, nested))| {
            *nested = quantize_group(group, offset, &search, codes);
            safe & survives(group, codes, table, *nested, offset)
        });
        NestedScales { offset, safe }
    }))
}

/// Writes the scales that [`quantize_absmax`] coded.
///
/// # Errors
/// [`CodecError::Length`].
pub fn dequantize_absmax(
    codes: &[u8],
    table: &[f32; 256],
    nested: &[f32],
    offset: f32,
    absmax: &mut [f32],
) -> Result<(), CodecError> {
    let len = absmax.len();
    check_len("codes", codes.len(), len, (len, "scales"))?;
    check_len("nested_absmax", nested.len(), len.div_ceil(NESTED_BLOCKSIZE), (len, "scales"))?;
    parallel::alone(|| {
        let groups = absmax.chunks_mut(NESTED_BLOCKSIZE).zip(codes.chunks(NESTED_BLOCKSIZE));
        for ((absmax, codes), &nested) in groups.zip(nested) {
            for (absmax, &code) in absmax.iter_mut().zip(codes) {
                *absmax = decode(table, code, nested, offset);
            }
        }
    });
    Ok(())
}

/// Two roundings: Rust never fuses a product and a sum.
fn decode(table: &[f32; 256], code: u8, nested: f32, offset: f32) -> f32 {
    table[usize::from(code)] * nested + offset
}

fn mean(absmax: &[f32]) -> f32 {
    if absmax.is_empty() {
        return 0.0;
    }
    let group_sum = |group: &[f32]| group.iter().fold(0.0, |sum, &a| sum + f64::from(a));
    let sum: f64 = absmax.chunks(NESTED_BLOCKSIZE).map(group_sum).fold(0.0, |sum, s| sum + s);
    (sum / absmax.len() as f64) as f32
}

fn quantize_group(group: &[f32], offset: f32, search: &Search, codes: &mut [u8]) -> f32 {
    let nested = group.iter().fold(0.0_f32, |nested, a| nested.max((a - offset).abs()));
    for (code, a) in codes.iter_mut().zip(group) {
        *code = search.nearest(if nested == 0.0 { 0.0 } else { (a - offset) / nested });
    }
    nested
}

fn survives(group: &[f32], codes: &[u8], table: &[f32; 256], nested: f32, offset: f32) -> bool {
    group.iter().zip(codes).all(|(&a, &code)| {
        let decoded = decode(table, code, nested, offset);
        let same_sign = (decoded > 0.0) == (a > 0.0) && (decoded < 0.0) == (a < 0.0);
        a == 0.0 || (same_sign && (decoded - a).abs() <= a.abs() / 8.0)
    })
}

/// Finds the nearest of 256 ascending values: the number of midpoints strictly below.
///
/// A grid over [-1, 1] says how many midpoints lie in lower cells; the few of the value's own
/// cell are compared. The cell is a monotone function of the value, so no other midpoint matters.
struct Search {
    midpoints: [f32; 255],
    /// Midpoints in the cells below each cell, and, in the last entry, in all cells.
    below: [u8; Self::CELLS + 1],
}

impl Search {
    const CELLS: usize = 1024;

    fn new(table: &[f32; 256]) -> Result<Self, CodecError> {
        let wrong = |i: &usize| !table[*i].is_finite() || (*i > 0 && table[i - 1] > table[*i]);
        if let Some(index) = (0..table.len()).find(wrong) {
            return Err(CodecError::TableNotAscending { index });
        }
        #[allow(clippy::manual_midpoint)] // the sum is rounded to fp32
        let midpoints = core::array::from_fn(|i| (table[i] + table[i + 1]) / 2.0);
        let mut below = [0_u8; Self::CELLS + 1];
        for midpoint in midpoints {
            for count in &mut below[Self::cell(midpoint) + 1..] {
                *count += 1;
            }
        }
        Ok(Self { midpoints, below })
    }

    fn cell(value: f32) -> usize {
        // The cast saturates: what lies outside [-1, 1] joins the outermost cells, NaN the first.
        let scaled = (value + 1.0) * (Self::CELLS / 2) as f32;
        (scaled as usize).min(Self::CELLS - 1)
    }

    fn nearest(&self, value: f32) -> u8 {
        let cell = Self::cell(value);
        let (first, end) = (self.below[cell], self.below[cell + 1]);
        let own = &self.midpoints[usize::from(first)..usize::from(end)];
        let passed = match own {
            [] => 0,
            [only] => usize::from(*only < value),
            _ => own.partition_point(|midpoint| *midpoint < value),
        };
        first + passed as u8
    }
}
