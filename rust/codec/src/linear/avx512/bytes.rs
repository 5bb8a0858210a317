//! Weights and values rounded to bytes with signs.
//!
//! ```text
//! W[n][k]   ~ ws[n][p] * wq[n][k]     p the part of 1024 columns that k lies in,
//!                                     ws = max |scale of its blocks| * max |code| / 127
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use crate::linear::avx512::decode::CHUNK;
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::matvec::scales_avx512::write_scales;
use crate::linear::weight::{Codes, Weight};
use crate::scratch::Scratch;
use crate::x86::avx512::load_f32;

/// Columns with one scale in each row of W, in chunks.
pub(crate) const PART: usize = 8;

/// 2^-128: smaller steps have no inverse.
const LEAST_STEP: f32 = f32::MIN_POSITIVE / 4.0;

/// What bytes stand for, where the largest magnitude is 127 (or less, if the step would be too
/// small); NaN for magnitudes that are not finite, whose sums are not.
#[inline(always)]
pub(crate) fn step_of(largest: f32) -> f32 {
    match largest {
        0.0 => 0.0,
        _ if largest.is_finite() => (largest / 127.0).max(LEAST_STEP),
        _ => f32::NAN,
    }
}

/// What values are multiplied by to be bytes.
#[inline(always)]
pub(crate) fn inverse(step: f32) -> f32 {
    if step > 0.0 {
        (1.0 / step).min(f32::MAX)
    } else {
        0.0
    }
}

/// What the bytes of a strip stand for.
pub(crate) struct Scaled {
    /// For each row and part: what its bytes are multiplied by.
    pub(crate) steps: Vec<f32>,
    /// For each row and 64 columns: what the codes of a block are multiplied by to give bytes.
    pub(crate) factors: Scratch<f32>,
    pub(crate) parts: usize,
}

impl Scaled {
    /// Of a row; of rows after the last, any number.
    #[inline(always)]
    pub(crate) fn step(&self, row: usize, part: usize) -> f32 {
        self.steps.get(row * self.parts + part).copied().unwrap_or(0.0)
    }

    /// For some rows of a weight, and its codes if their chunks have scales.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn new(
        weight: &Weight<'_>,
        nibbles: Option<&Nibbles<'_>>,
        rows: Range<usize>,
    ) -> Self {
        let chunks = weight.cols.div_ceil(CHUNK);
        let parts = chunks.div_ceil(PART);
        let mut steps = vec![0.0; rows.len() * parts];
        if let Some(nibbles) = nibbles {
            let largest = nibbles.table.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
            let mut factors = nibbles.scales(rows.clone(), chunks);
            for (steps, row) in steps.chunks_mut(parts).zip(factors.chunks_mut(2 * chunks)) {
                for (step, scales) in steps.iter_mut().zip(row.chunks_mut(2 * PART)) {
                    *step = step_of(magnitude(scales) * largest);
                    let inverse = inverse(*step);
                    for scale in scales {
                        *scale *= inverse;
                    }
                }
            }
            return Self { steps, factors, parts };
        }
        let Weight { cols, blocksize, scales, codes, .. } = *weight;
        let largest = match codes {
            Codes::FourBit { table, .. } => table.iter().fold(0.0_f32, |a, v| a.max(v.abs())),
            Codes::Int8(_) => 1.0,
        };
        let mut room = Vec::new();
        for (row, steps) in rows.clone().zip(steps.chunks_mut(parts)) {
            for (part, step) in steps.iter_mut().enumerate() {
                let first = row * cols + part * PART * CHUNK;
                let last = (first + PART * CHUNK).min((row + 1) * cols);
                let blocks = first / blocksize..last.div_ceil(blocksize);
                room.resize(blocks.len(), 0.0);
                write_scales(&scales, blocks.start, &mut room);
                *step = step_of(magnitude(&room) * largest);
            }
        }
        Self { steps, factors: Scratch::new(0), parts }
    }
}

/// The largest magnitude; NaN if there is one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn magnitude(scales: &[f32]) -> f32 {
    f32::from_bits(scales.iter().map(|scale| scale.abs().to_bits()).max().unwrap_or(0))
}

/// Up to 128 values times `factor`, rounded to bytes with signs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn to_bytes(values: &[f32], factor: f32) -> [u8; CHUNK] {
    let mut room = [0.0; CHUNK];
    room[..values.len()].copy_from_slice(values);
    let mut bytes = [0; CHUNK];
    let factor = _mm512_set1_ps(factor);
    for (to, from) in bytes.as_chunks_mut::<16>().0.iter_mut().zip(room.as_chunks().0) {
        let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_f32(from), factor));
        let narrow = _mm512_cvtsepi32_epi8(rounded);
        // SAFETY: the array is 16 bytes long; the store takes any alignment.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), narrow) };
    }
    bytes
}
