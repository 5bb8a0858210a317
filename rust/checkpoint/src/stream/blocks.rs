//! Codes of E2M1 with scales of 8 bits, as MXFP4 and NVFP4 store them.
//!
//! OCP Microscaling Formats (MX) 1.0 says what E2M1 and E8M0 are; OCP 8-bit Floating Point 1.0 what
//! E4M3 is. A value is `code * scale` in fp32.

use std::ops::Range;

use super::job::{Blocks, Scale, Weight};
use super::values::first;
use super::Place;
use crate::error::CheckpointError;

/// What a code of E2M1 stands for.
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// `2^(byte - 127)`; 255 is NaN.
pub(super) fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22), // 2^-127, subnormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// A sign, four bits of exponent, three of mantissa; no infinity, and the largest byte is NaN.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * (exponent - 7).pow2(),
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

trait PowerOfTwo {
    fn pow2(self) -> f32;
}

impl PowerOfTwo for i32 {
    /// Of small numbers.
    fn pow2(self) -> f32 {
        f32::from_bits(((self + 127) as u32) << 23)
    }
}

impl Scale {
    fn decode(self, byte: u8) -> f32 {
        match self {
            Self::E8m0 => e8m0(byte),
            Self::E4m3 { factor, divisor } => e4m3(byte) * factor / divisor,
        }
    }
}

/// A thread's memory for the codes and scales of a chunk.
#[derive(Default)]
pub(super) struct BlockBuffer {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Blocks {
    /// The blocks that hold the values at `places`, as values.
    pub(super) fn around(&self, places: &Range<usize>) -> Range<usize> {
        let size = self.blocksize;
        places.start / size * size..places.end.div_ceil(size) * size
    }

    /// Reads the values at `places`, which are whole blocks.
    pub(super) fn read(
        &self,
        inputs: &[Place<'_>],
        places: &Range<usize>,
        buffer: &mut BlockBuffer,
        values: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let BlockBuffer { codes, scales } = buffer;
        let codes = first(codes, places.len() / 2);
        let at = self.codes.offset + places.start as u64 / 2;
        inputs[self.codes.file].read(codes, at)?;
        let scales = first(scales, places.len() / self.blocksize);
        let at = self.scales.offset + (places.start / self.blocksize) as u64;
        inputs[self.scales.file].read(scales, at)?;
        let table: [f32; 256] = std::array::from_fn(|byte| self.scale.decode(byte as u8));
        let blocks = values.chunks_exact_mut(self.blocksize);
        for ((codes, scale), values) in codes.chunks(self.blocksize / 2).zip(scales).zip(blocks) {
            let scale = table[usize::from(*scale)];
            let scaled = E2M1.map(|code| code * scale);
            for (byte, pair) in codes.iter().zip(values.chunks_exact_mut(2)) {
                pair[0] = scaled[usize::from(byte & 15)];
                pair[1] = scaled[usize::from(byte >> 4)];
            }
        }
        Ok(())
    }

    /// What is wrong, if something is.
    pub(super) fn check(&self, weight: &Weight, files: usize) -> Option<String> {
        let Self { codes, scales, blocksize, .. } = self;
        if *blocksize < 2
            || !blocksize.is_multiple_of(2)
            || !weight.numel.is_multiple_of(*blocksize)
        {
            return Some(format!("{} values are no whole blocks of {blocksize}", weight.numel));
        }
        codes
            .check(weight.numel as u64 / 2, files)
            .or_else(|| scales.check((weight.numel / blocksize) as u64, files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_what_their_standards_say() {
        assert_eq!(e8m0(127), 1.0);
        assert_eq!(e8m0(0), 2f32.powi(-126) / 2.0);
        assert_eq!(e8m0(1), 2f32.powi(-126));
        assert_eq!(e8m0(254), 2f32.powi(127));
        assert!(e8m0(255).is_nan());
        // Largest, one, smallest normal, smallest, zero.
        for (byte, value) in
            [(0x7e, 448.0), (0x38, 1.0), (0x08, 0.015_625), (0x01, 0.001_953_125), (0, 0.0)]
        {
            assert_eq!(e4m3(byte), value);
            assert_eq!(e4m3(byte | 0x80), -value);
        }
        assert!(e4m3(0x7f).is_nan());
        let ascending = (0..0x7e).all(|byte| e4m3(byte) < e4m3(byte + 1));
        assert!(ascending);
    }
}
