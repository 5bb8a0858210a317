//! The arrays of scales: fp32, or 8-bit codes with what decodes them.

use pyo3::prelude::*;
use qkern_codec::Scales;

use crate::arrays::{table, Input, Memory};
use crate::errors;

/// Scales, one a block.
pub(crate) enum ScaleArray<'py> {
    Plain(Input<'py, f32>),
    Nested { codes: Input<'py, u8>, table: Box<[f32; 256]>, nested: Input<'py, f32>, offset: f32 },
}

/// A table of 256 values, second-level scales and the offset, (1,).
pub(crate) type Nested<'a, 'py> = [Option<&'a Bound<'py, PyAny>>; 3];

impl<'py> ScaleArray<'py> {
    /// `absmax` with all that 8-bit codes need, or with nothing.
    pub(crate) fn new(absmax: &Bound<'py, PyAny>, nested: Nested<'_, 'py>) -> PyResult<Self> {
        match nested {
            [None, None, None] => Ok(Self::Plain(Input::new("absmax", absmax)?)),
            [Some(code), Some(nested), Some(offset)] => Ok(Self::Nested {
                codes: Input::new("absmax", absmax)?,
                table: Box::new(table("nested_code", code)?),
                nested: Input::new("nested_absmax", nested)?,
                offset: table::<1>("offset", offset)?[0],
            }),
            _ => {
                let message = "8-bit scales need nested_code, nested_absmax and offset: pass all \
                               three, or none of them with fp32 scales";
                Err(errors::format(absmax.py(), message.to_owned()))
            }
        }
    }

    pub(crate) fn memory(&self) -> Vec<Memory> {
        match self {
            Self::Plain(scales) => vec![scales.memory()],
            Self::Nested { codes, nested, .. } => vec![codes.memory(), nested.memory()],
        }
    }

    pub(crate) fn scales(&self) -> PyResult<Scales<'_>> {
        Ok(match self {
            Self::Plain(scales) => Scales::Plain(scales.slice()?),
            Self::Nested { codes, table, nested, offset } => Scales::Nested {
                codes: codes.slice()?,
                table,
                nested: nested.slice()?,
                offset: *offset,
            },
        })
    }
}
