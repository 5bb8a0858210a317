//! What the codec refuses, with the values that explain why.

use std::fmt;

use crate::layout::{MAX_BLOCKSIZE, MIN_BLOCKSIZE};

/// An input that cannot be coded, or a body that this machine cannot run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CodecError {
    /// The block size is not a power of two in the allowed range.
    Blocksize(usize),
    /// Rows, or blocks of any length, must have values.
    Row,
    /// A slice does not have the length that the values and the block size ask for.
    Length {
        /// Name of the slice.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that it must have.
        expected: usize,
        /// What it must go with, in words.
        unit: &'static str,
        /// How many of those there are.
        count: usize,
    },
    /// A matrix has more values than a program can address.
    Shape {
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
    /// A table of codes holds NaN or infinity.
    TableNotFinite {
        /// Place in the table.
        index: usize,
        /// What stands there.
        value: f32,
    },
    /// The 256 codes of scales do not ascend.
    TableNotAscending {
        /// Place of the first value that is not finite or is smaller than the one before it.
        index: usize,
    },
    /// The importance of a column is negative, NaN or infinite.
    Importance {
        /// The column.
        index: usize,
        /// Its importance.
        value: f32,
    },
    /// The importance is not one weight for each column of the values.
    Columns {
        /// How many weights there are.
        columns: usize,
        /// How many values.
        values: usize,
    },
    /// NaN or infinity among the values to quantize; the outputs are unspecified.
    NonFinite {
        /// Place of the first such value.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// Whoever may interrupt the work did; the outputs are unspecified.
    Interrupted,
    /// No SIMD body has this name.
    UnknownSimd {
        /// The name.
        name: String,
        /// Where the name came from.
        origin: &'static str,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// The SIMD body exists, but not on this machine.
    UnavailableSimd {
        /// The name.
        name: String,
        /// Where the name came from.
        origin: &'static str,
        /// The names of the bodies that this machine can run, separated by commas.
        available: String,
    },
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocksize(found) => write!(
                f,
                "blocksize {found} is not supported: allowed are the powers of two from \
                 {MIN_BLOCKSIZE} to {MAX_BLOCKSIZE}"
            ),
            Self::Row => write!(f, "a row of 0 values has no scale: pass a length of 1 or more"),
            Self::Length { what, found, expected, unit, count } => {
                write!(f, "{what} has length {found}, but {count} {unit} need {expected}")
            }
            Self::Shape { rows, cols } => {
                write!(f, "a matrix of {rows} by {cols} has more values than memory can hold")
            }
            Self::TableNotFinite { index, value } => write!(
                f,
                "the code table holds {value} at index {index}: all its values must be finite"
            ),
            Self::TableNotAscending { index } => write!(
                f,
                "the nested code table is wrong at index {index}: its 256 values must be finite and \
                 must ascend"
            ),
            Self::Importance { index, value } => write!(
                f,
                "the importance of column {index} is {value}: finite weights of 0 or more are needed"
            ),
            Self::Columns { columns, values } => write!(
                f,
                "importance has {columns} weights, and {values} values are no rows of as many \
                 columns: pass one weight for each in_feature"
            ),
            Self::NonFinite { index, count } => write!(
                f,
                "NaN or infinity in {count} of the values to quantize, first at index {index}: \
                 repair them, or choose nonfinite=\"keep\" to confine the damage to their blocks"
            ),
            Self::Interrupted => write!(f, "interrupted: the outputs are unspecified"),
            Self::UnknownSimd { name, origin, known } => {
                write!(f, "{origin} names the SIMD body {name:?}, which does not exist: allowed are {known}")
            }
            Self::UnavailableSimd { name, origin, available } => write!(
                f,
                "{origin} names the SIMD body {name:?}, which this machine cannot run: it can run \
                 {available}; leave the choice to qkern or name one of these"
            ),
        }
    }
}

impl std::error::Error for CodecError {}
