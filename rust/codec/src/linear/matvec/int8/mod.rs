//! Products in integers: x rounded to 8 bits, codes as integers too.
//!
//! ```text
//! x        blocks of 64: x' = round half even(x * (127 / absmax)), step absmax * fp32(1 / 127)
//! 4 bits   value = unit * (128 * high + low), high in -64..=63, low in 0..=127: 14 bits of the
//!          table by its largest magnitude. Unsigned bytes go into the products, high + 64 and low,
//!          so that pairs of products fit 16 bits; the sums start at -64 times those of x'
//! 8 bits   the codes as they are
//! y        sum of  scale * (step * unit) * integer,  fp32
//! ```
//!
//! The integers are exact in every body: bodies differ in the order of the fp32 sums alone.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)] // an instruction that has no stable intrinsic
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(test)]
mod tests;

use crate::linear::weight::{Codes, Weight};
use crate::quantize_int8::quantize_int8;
use crate::simd::{Bodies, Engine};
use crate::values::{NonFinite, Values};

/// Tokens up to which this is faster than products of whole panels, where a body has these in 8 bits.
pub(crate) const FEW: usize = 2;

/// Values of x that share a step.
pub(crate) const BLOCK: usize = 64;
/// Values that an AVX-512 body multiplies together.
pub(crate) const CHUNK: usize = 128;

/// Tokens rounded to 8 bits, each filled up with zeros.
#[derive(Debug)]
pub(crate) enum Rounded {
    /// For 4-bit codes.
    FourBit {
        /// Those of all tokens.
        chunks: Vec<Chunk>,
        /// The table in integers: `high + 64`, and `low`.
        table: [[u8; 16]; 2],
    },
    /// For 8-bit codes.
    Int8(Vec<Piece>),
}

/// 128 values in the order of the bytes of 4-bit codes. Lane `l` of a product has values `8 l` to
/// `8 l + 7`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// Values at even places, which meet the high nibbles.
    pub(crate) even: [i8; 64],
    /// Those at odd places.
    pub(crate) odd: [i8; 64],
    /// What the sum of each lane starts at.
    pub(crate) start: [i32; 16],
    /// The step of each lane's block, times the unit of the table.
    pub(crate) step: [f32; 16],
}

/// 64 values. Lane `l` of a product has values `4 l` to `4 l + 3`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// The values.
    pub(crate) values: [i8; 64],
    /// What the sum of each lane starts at, if codes are made unsigned by adding 128.
    pub(crate) start: [i32; 16],
    /// Their step.
    pub(crate) step: f32,
}

/// Whether the blocks of a weight fit those of x.
pub(crate) fn serves(weight: &Weight<'_>) -> bool {
    match weight.codes {
        Codes::FourBit { .. } => true,
        Codes::Int8(_) => weight.blocksize.is_multiple_of(BLOCK) || weight.blocksize == weight.cols,
    }
}

impl Rounded {
    /// Rounds tokens, (M, `weight.cols`).
    pub(crate) fn new(bodies: &'static Bodies, x: &[f32], weight: &Weight<'_>) -> Self {
        let padded = weight.cols.next_multiple_of(CHUNK);
        let tokens = x.len() / weight.cols;
        let mut values = vec![0; tokens * padded];
        let mut steps = vec![0.0; tokens * padded / BLOCK];
        let rows = values.chunks_exact_mut(padded).zip(steps.chunks_exact_mut(padded / BLOCK));
        for (x, (values, steps)) in x.chunks_exact(weight.cols).zip(rows) {
            let blocks = weight.cols.div_ceil(BLOCK);
            let (values, steps) = (&mut values[..weight.cols], &mut steps[..blocks]);
            let engine = Engine::new(bodies, 1);
            // A block with NaN or infinity has such a scale, and so has every sum.
            quantize_int8(engine, Values::F32(x), BLOCK, NonFinite::Keep, values, steps)
                .expect("the lengths fit, and nobody interrupts");
        }
        let (values, steps) = (values.as_chunks::<BLOCK>().0, &steps[..]);
        match weight.codes {
            Codes::FourBit { table, .. } => {
                let (table, unit) = integers(table);
                let pairs = values.as_chunks::<2>().0.iter().zip(steps.as_chunks::<2>().0);
                let chunks = pairs.map(|(values, steps)| Chunk::new(values, steps, unit));
                Self::FourBit { chunks: chunks.collect(), table }
            }
            Codes::Int8(_) => {
                Self::Int8(values.iter().zip(steps).map(|(v, &s)| Piece::new(v, s)).collect())
            }
        }
    }
}

impl Chunk {
    fn new(values: &[[i8; BLOCK]; 2], absmax: &[f32; 2], unit: f32) -> Self {
        let mut chunk = Self { even: [0; 64], odd: [0; 64], start: [0; 16], step: [0.0; 16] };
        let values = values.as_flattened().as_chunks::<2>().0;
        for ((pair, even), odd) in values.iter().zip(&mut chunk.even).zip(&mut chunk.odd) {
            [*even, *odd] = *pair;
        }
        let sums = values.as_chunks::<4>().0.iter().map(|eight| sum(eight.as_flattened()));
        chunk.start.iter_mut().zip(sums).for_each(|(start, sum)| *start = -64 * sum);
        chunk.step[..8].fill(step(absmax[0]) * unit);
        chunk.step[8..].fill(step(absmax[1]) * unit);
        chunk
    }
}

impl Piece {
    fn new(values: &[i8; BLOCK], absmax: f32) -> Self {
        let mut start = [0; 16];
        let sums = values.as_chunks::<4>().0.iter().map(|four| sum(four));
        start.iter_mut().zip(sums).for_each(|(start, sum)| *start = -128 * sum);
        Self { values: *values, start, step: step(absmax) }
    }
}

fn sum(values: &[i8]) -> i32 {
    values.iter().map(|&v| i32::from(v)).sum()
}

fn step(absmax: f32) -> f32 {
    crate::dequantize_int8::step(absmax)
}

/// A table as integers of 14 bits, in two halves of 7, and what one of them stands for.
pub(crate) fn integers(table: &[f32; 16]) -> ([[u8; 16]; 2], f32) {
    let largest = table.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let unit = f64::from(largest) / 8191.0;
    let integers = table.map(|value| {
        let scaled = if largest > 0.0 { f64::from(value) / unit } else { 0.0 };
        scaled.round() as i32
    });
    let high = integers.map(|i| ((i >> 7) + 64) as u8);
    let low = integers.map(|i| (i & 127) as u8);
    ([high, low], unit as f32)
}
