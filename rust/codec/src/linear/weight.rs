//! A quantized weight as its parts, and strips of its rows as floats.

use std::ops::Range;

use crate::codebook::check_table;
use crate::dequantize::dequantize_4bit;
use crate::dequantize_int8::dequantize_int8;
use crate::error::CodecError;
use crate::layout::{check_blocksize, check_len, check_row, packed_len};
use crate::scales::Scales;
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
        self.scales.check(len, self.blocksize)
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
        (bodies.write_scales)(&self.scales, blocks.start, &mut scales);
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
