//! A quantized weight as its parts, and strips of its rows as floats.

use std::ops::Range;

use crate::codebook::check_table;
use crate::dequantize::dequantize_4bit;
use crate::dequantize_int8::dequantize_int8;
use crate::double_quant::{decode, NESTED_BLOCKSIZE};
use crate::error::CodecError;
use crate::layout::{check_blocksize, check_len, check_row, num_blocks, packed_len};
use crate::simd::{Bodies, Engine};
use crate::values::{with_slice, Element, Stores, ValuesMut};

/// The codes of a weight, row by row.
#[derive(Clone, Copy, Debug)]
pub enum Codes<'a> {
    /// Two codes a byte, the even one in the high nibble, and what they stand for.
    FourBit {
        /// The bytes.
        packed: &'a [u8],
        /// The value of each code.
        table: &'a [f32; 16],
    },
    /// Integers in -127..=127.
    Int8(&'a [i8]),
}

/// The scales of a weight, one a block.
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

/// A quantized matrix, (rows, cols): blocks run over the flat tensor.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The codes of all values.
    pub codes: Codes<'a>,
    /// The scales of all blocks.
    pub scales: Scales<'a>,
    /// Values that share a scale.
    pub blocksize: usize,
    /// Out-features.
    pub rows: usize,
    /// In-features.
    pub cols: usize,
}

impl Scales<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    /// Writes the scales from that of block `first` on.
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

impl Weight<'_> {
    /// Refuses parts that do not fit together.
    pub(crate) fn check(&self) -> Result<(), CodecError> {
        let len = self
            .rows
            .checked_mul(self.cols)
            .ok_or(CodecError::Shape { rows: self.rows, cols: self.cols })?;
        match self.codes {
            Codes::FourBit { packed, table } => {
                check_blocksize(self.blocksize)?;
                check_table(table)?;
                check_len("packed", packed.len(), packed_len(len), (len, "values"))?;
            }
            Codes::Int8(codes) => {
                check_row(self.blocksize)?;
                check_len("packed", codes.len(), len, (len, "values"))?;
            }
        }
        let blocks = num_blocks(len, self.blocksize);
        check_len("absmax", self.scales.len(), blocks, (len, "values"))?;
        if let Scales::Nested { nested, .. } = self.scales {
            let groups = blocks.div_ceil(NESTED_BLOCKSIZE);
            check_len("nested_absmax", nested.len(), groups, (blocks, "scales"))?;
        }
        Ok(())
    }

    /// Whether every row is whole blocks.
    pub(crate) fn rows_are_blocks(&self) -> bool {
        self.cols.is_multiple_of(self.blocksize)
    }

    /// Whether codes have 4 bits, and each 64 of a row from its first on have one scale.
    pub(crate) fn chunks_have_scales(&self) -> bool {
        matches!(self.codes, Codes::FourBit { .. })
            && self.rows_are_blocks()
            && self.blocksize.is_multiple_of(64)
    }

    /// Writes the values of some rows, in the dtype of `out`, rounded once.
    pub(crate) fn dequantize_rows(
        &self,
        bodies: &'static Bodies,
        rows: Range<usize>,
        out: ValuesMut<'_>,
    ) {
        let (first, last) = (rows.start * self.cols, rows.end * self.cols);
        let blocks = first / self.blocksize..last.div_ceil(self.blocksize);
        let from = blocks.start * self.blocksize;
        let until = (blocks.end * self.blocksize).min(self.rows * self.cols);
        let mut scales = vec![0.0; blocks.len()];
        self.scales.write(blocks.start, &mut scales);
        with_slice!(out, ValuesMut, out => {
            if (from, until) == (first, last) {
                self.dequantize_range(bodies, from..until, &scales, Element::values_mut(out));
            } else {
                let mut room = vec![Element::ZERO; until - from];
                let values = Element::values_mut(&mut room);
                self.dequantize_range(bodies, from..until, &scales, values);
                out.copy_from_slice(&room[first - from..last - from]);
            }
        });
    }

    /// Writes the values of whole blocks (the last may end with the tensor).
    pub(crate) fn dequantize_range(
        &self,
        bodies: &'static Bodies,
        range: Range<usize>,
        scales: &[f32],
        out: ValuesMut<'_>,
    ) {
        let engine = Engine::new(bodies, 1);
        let done = match self.codes {
            Codes::FourBit { packed, table } => {
                let packed = &packed[range.start / 2..range.end.div_ceil(2)];
                dequantize_4bit(engine, packed, scales, table, self.blocksize, out, Stores::Cached)
            }
            Codes::Int8(codes) => {
                dequantize_int8(engine, &codes[range], scales, self.blocksize, out, Stores::Cached)
            }
        };
        done.expect("the parts were checked, and nobody interrupts");
    }
}
