//! The scales of blocks as they are stored: fp32, or in 8 bits.

use crate::double_quant::{decode, NESTED_BLOCKSIZE};
use crate::error::CodecError;
use crate::layout::{check_len, num_blocks};
use crate::scratch::Scratch;
use crate::simd::Bodies;

/// Scales, one a block.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// In 8 bits (see [`crate::quantize_absmax`]).
    Nested {
        /// One a block.
        codes: &'a [u8],
        /// 256 ascending values.
        table: &'a [f32; 256],
        /// One a group of 256 blocks.
        nested: &'a [f32],
        /// Added to each decoded scale.
        offset: f32,
    },
}

impl<'a, T: AsRef<[f32]> + ?Sized> From<&'a T> for Scales<'a> {
    fn from(scales: &'a T) -> Self {
        Self::Plain(scales.as_ref())
    }
}

impl Scales<'_> {
    /// Refuses scales that are not those of `len` values.
    pub(crate) fn check(&self, len: usize, blocksize: usize) -> Result<(), CodecError> {
        let blocks = num_blocks(len, blocksize);
        let found = match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { codes, .. } => codes.len(),
        };
        check_len("absmax", found, blocks, (len, "values"))?;
        if let Self::Nested { nested, .. } = self {
            let groups = blocks.div_ceil(NESTED_BLOCKSIZE);
            check_len("nested_absmax", nested.len(), groups, (blocks, "scales"))?;
        }
        Ok(())
    }

    /// Hands `count` scales from that of block `first` on to `work`.
    pub(crate) fn with<R>(
        &self,
        bodies: &Bodies,
        first: usize,
        count: usize,
        work: impl FnOnce(&[f32]) -> R,
    ) -> R {
        if let Self::Plain(scales) = self {
            return work(&scales[first..first + count]);
        }
        let mut decoded = Scratch::<f32>::new(count);
        (bodies.write_scales)(self, first, &mut decoded);
        work(&decoded)
    }

    /// Writes the scales from that of block `first` on: what every body's way does.
    pub(crate) fn write(&self, first: usize, out: &mut [f32]) {
        match *self {
            Self::Plain(scales) => out.copy_from_slice(&scales[first..first + out.len()]),
            Self::Nested { codes, table, nested, offset } => {
                let codes = &codes[first..first + out.len()];
                for (i, (out, &code)) in out.iter_mut().zip(codes).enumerate() {
                    *out = decode(table, code, nested[(first + i) / NESTED_BLOCKSIZE], offset);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::JOB;
    use crate::testing::{hard_values, Random, Weights};
    use crate::{available, dequantize_4bit, dequantize_int8, Engine, Stores};

    /// Codes of `count` scales, with a table and second-level scales of every kind.
    fn parts(count: usize) -> (Vec<u8>, [f32; 256], Vec<f32>) {
        let codes = Random(count as u64).bytes(count);
        let table = hard_values(1, 256, 4).try_into().unwrap();
        (codes, table, hard_values(2, count.div_ceil(NESTED_BLOCKSIZE), 4))
    }

    #[test]
    fn every_body_decodes_any_run_of_scales() {
        let (codes, table, nested) = parts(1000);
        let scales = Scales::Nested { codes: &codes, table: &table, nested: &nested, offset: 0.3 };
        for bodies in available() {
            for first in [0, 1, 15, 250, 255, 256, 700] {
                for count in [0, 1, 15, 16, 17, 200, 300] {
                    let mut expected = vec![0.0; count];
                    scales.write(first, &mut expected);
                    let found = scales.with(bodies, first, count, <[f32]>::to_vec);
                    let [found, expected] = [found, expected]
                        .map(|all| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                    assert_eq!(found, expected, "{} {first} {count}", bodies.name());
                }
            }
        }
    }

    #[test]
    fn values_of_nested_scales_are_those_of_the_decoded_ones() {
        const TABLE: [f32; 16] = crate::codebook::tests::NF4;
        for (blocksize, len) in [(64, 100), (32, 2 * JOB + 77), (4096, 3 * JOB)] {
            let (codes, table, nested) = parts(num_blocks(len, blocksize));
            let scales =
                Scales::Nested { codes: &codes, table: &table, nested: &nested, offset: 1.0 };
            let mut decoded = vec![0.0; codes.len()];
            scales.write(0, &mut decoded);
            let bytes = Random(3).bytes(len);
            let signed: Vec<i8> = bytes.iter().map(|&b| b.cast_signed()).collect();
            for bodies in available() {
                for threads in [1, 2] {
                    let engine = Engine::new(bodies, threads);
                    let [mut found, mut expected] =
                        [Weights::room(len)[2].clone(), Weights::room(len)[2].clone()];
                    let packed = &bytes[..len.div_ceil(2)];
                    let stores = Stores::Cached;
                    let from = Scales::Plain(&decoded);
                    dequantize_4bit(
                        engine,
                        packed,
                        scales,
                        &TABLE,
                        blocksize,
                        found.values_mut(),
                        stores,
                    )
                    .unwrap();
                    dequantize_4bit(
                        engine,
                        packed,
                        from,
                        &TABLE,
                        blocksize,
                        expected.values_mut(),
                        stores,
                    )
                    .unwrap();
                    assert_eq!(found.bits(), expected.bits(), "{} {blocksize}", bodies.name());
                    dequantize_int8(engine, &signed, scales, blocksize, found.values_mut(), stores)
                        .unwrap();
                    dequantize_int8(
                        engine,
                        &signed,
                        from,
                        blocksize,
                        expected.values_mut(),
                        stores,
                    )
                    .unwrap();
                    assert_eq!(found.bits(), expected.bits(), "{} {blocksize}", bodies.name());
                }
            }
        }
    }

    #[test]
    fn second_level_scales_that_are_missing_are_refused() {
        let (codes, table, nested) = parts(300);
        let scales =
            Scales::Nested { codes: &codes, table: &table, nested: &nested[..1], offset: 0.0 };
        let found = scales.check(300 * 64, 64).unwrap_err();
        assert!(matches!(found, CodecError::Length { what: "nested_absmax", .. }), "{found:?}");
    }
}
