//! Arrays and buffers as slices: the only place where Python's memory is touched.
//!
//! Arrays are 1-D, C-contiguous and aligned. rust-numpy's borrow check keeps other calls away from
//! an output; it goes by the owner of the memory, so the ranges of one call are compared here as
//! well (two arrays can view one tensor without sharing an owner, and a [`Buffer`] has no check).

use std::ops::Range;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::{
    dtype, BorrowError, Element, PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use qkern_codec::{Values, ValuesMut};

use crate::buffer::{Buffer, Stored};
use crate::errors;

/// What is read.
pub(crate) struct Input<'py, T: Element + Stored> {
    name: &'static str,
    source: Source<'py, PyReadonlyArray1<'py, T>>,
}

/// What is written.
pub(crate) struct Output<'py, T: Element + Stored> {
    name: &'static str,
    source: Source<'py, PyReadwriteArray1<'py, T>>,
}

enum Source<'py, A> {
    Array(A),
    Buffer(Bound<'py, Buffer>),
}

impl<'py, T: Element + Stored> Input<'py, T> {
    pub(crate) fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let source = if let Ok(buffer) = object.cast::<Buffer>() {
            buffer.get().check::<T>(name, object.py())?;
            Source::Buffer(buffer.clone())
        } else {
            let array = checked::<T>(name, object)?;
            Source::Array(array.try_readonly().map_err(|e| borrow_error(&array, name, &e))?)
        };
        Ok(Self { name, source })
    }

    pub(crate) fn slice(&self) -> PyResult<&[T]> {
        match &self.source {
            Source::Array(array) => {
                array.as_slice().map_err(|_| layout_error(array.py(), self.name))
            }
            // SAFETY: `new` checked the type; whoever made the buffer vouches for its memory, and
            // `check_apart` for no output of this call being in it.
            Source::Buffer(buffer) => Ok(unsafe { buffer.get().slice() }),
        }
    }

    pub(crate) fn memory(&self) -> Memory {
        match &self.source {
            Source::Array(array) => Memory::of(self.name, array),
            Source::Buffer(buffer) => Memory { name: self.name, bytes: buffer.get().bytes() },
        }
    }
}

impl<'py, T: Element + Stored> Output<'py, T> {
    pub(crate) fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let source = if let Ok(buffer) = object.cast::<Buffer>() {
            buffer.get().check::<T>(name, object.py())?;
            Source::Buffer(buffer.clone())
        } else {
            let array = checked::<T>(name, object)?;
            Source::Array(array.try_readwrite().map_err(|e| borrow_error(&array, name, &e))?)
        };
        Ok(Self { name, source })
    }

    pub(crate) fn slice(&mut self) -> PyResult<&mut [T]> {
        match &mut self.source {
            Source::Array(array) => {
                let py = array.py();
                array.as_slice_mut().map_err(|_| layout_error(py, self.name))
            }
            // SAFETY: as for an input; `check_apart` keeps inputs and other outputs of this call
            // out of the memory, and `&mut self` a second slice of this one.
            Source::Buffer(buffer) => Ok(unsafe { buffer.get().slice_mut() }),
        }
    }

    pub(crate) fn memory(&self) -> Memory {
        match &self.source {
            Source::Array(array) => Memory::of(self.name, array),
            Source::Buffer(buffer) => Memory { name: self.name, bytes: buffer.get().bytes() },
        }
    }
}

/// Weights to read: `uint16` bit patterns for the 16-bit dtypes.
pub(crate) enum InputValues<'py> {
    F32(Input<'py, f32>),
    F16(Input<'py, u16>),
    Bf16(Input<'py, u16>),
}

impl<'py> InputValues<'py> {
    pub(crate) fn new(object: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Self> {
        Self::named("values", object, dtype)
    }

    /// What errors call `name`.
    pub(crate) fn named(
        name: &'static str,
        object: &Bound<'py, PyAny>,
        dtype: &str,
    ) -> PyResult<Self> {
        match dtype {
            "float32" => Ok(Self::F32(Input::new(name, object)?)),
            "float16" => Ok(Self::F16(Input::new(name, object)?)),
            "bfloat16" => Ok(Self::Bf16(Input::new(name, object)?)),
            _ => Err(unknown_dtype(object.py(), dtype)),
        }
    }

    pub(crate) fn slice(&self) -> PyResult<Values<'_>> {
        Ok(match self {
            Self::F32(input) => Values::F32(input.slice()?),
            Self::F16(input) => Values::F16(input.slice()?.reinterpret_cast::<f16>()),
            Self::Bf16(input) => Values::Bf16(input.slice()?.reinterpret_cast::<bf16>()),
        })
    }

    pub(crate) fn memory(&self) -> Memory {
        match self {
            Self::F32(input) => input.memory(),
            Self::F16(input) | Self::Bf16(input) => input.memory(),
        }
    }
}

/// Weights to write: `uint16` bit patterns for the 16-bit dtypes.
pub(crate) enum OutputValues<'py> {
    F32(Output<'py, f32>),
    F16(Output<'py, u16>),
    Bf16(Output<'py, u16>),
}

impl<'py> OutputValues<'py> {
    pub(crate) fn new(object: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "float32" => Ok(Self::F32(Output::new("values", object)?)),
            "float16" => Ok(Self::F16(Output::new("values", object)?)),
            "bfloat16" => Ok(Self::Bf16(Output::new("values", object)?)),
            _ => Err(unknown_dtype(object.py(), dtype)),
        }
    }

    pub(crate) fn slice(&mut self) -> PyResult<ValuesMut<'_>> {
        Ok(match self {
            Self::F32(output) => ValuesMut::F32(output.slice()?),
            Self::F16(output) => ValuesMut::F16(output.slice()?.reinterpret_cast_mut::<f16>()),
            Self::Bf16(output) => ValuesMut::Bf16(output.slice()?.reinterpret_cast_mut::<bf16>()),
        })
    }

    pub(crate) fn memory(&self) -> Memory {
        match self {
            Self::F32(output) => output.memory(),
            Self::F16(output) | Self::Bf16(output) => output.memory(),
        }
    }
}

/// A table of `N` values.
pub(crate) fn table<const N: usize>(
    name: &'static str,
    object: &Bound<'_, PyAny>,
) -> PyResult<[f32; N]> {
    let input = Input::<f32>::new(name, object)?;
    let slice = input.slice()?;
    slice.try_into().map_err(|_| {
        let found = slice.len();
        errors::shape(object.py(), format!("{name} has {found} values, but the table needs {N}"))
    })
}

/// Where an array lies in memory.
pub(crate) struct Memory {
    name: &'static str,
    bytes: Range<usize>,
}

impl Memory {
    fn of<T: Element>(name: &'static str, array: &Bound<'_, PyArray1<T>>) -> Self {
        let start = array.data() as usize;
        Self { name, bytes: start..start + array.len() * size_of::<T>() }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.bytes.start.max(other.bytes.start) < self.bytes.end.min(other.bytes.end)
    }
}

/// Refuses outputs that overlap an input or each other. Call it before taking any slice.
pub(crate) fn check_apart(py: Python<'_>, outputs: &[Memory], inputs: &[Memory]) -> PyResult<()> {
    for (i, output) in outputs.iter().enumerate() {
        let others = outputs[i + 1..].iter().chain(inputs);
        if let Some(other) = others.into_iter().find(|other| output.overlaps(other)) {
            let (output, other) = (output.name, other.name);
            let message = format!("{output} and {other} share memory: pass an output of its own");
            return Err(errors::shape(py, message));
        }
    }
    Ok(())
}

/// The array, if it has the right dtype, one dimension and no gaps.
fn checked<'py, T: Element>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<T>>> {
    let py = object.py();
    let Ok(untyped) = object.cast::<PyUntypedArray>() else {
        let found = object.get_type().name()?;
        let message = format!("{name} is a {found}: pass a NumPy array, or a Buffer");
        return Err(errors::dtype(py, message));
    };
    let needed = dtype::<T>(py);
    if !untyped.dtype().is(&needed) && !untyped.dtype().eq(&needed)? {
        let message = format!("{name} has dtype {}: pass {needed}", untyped.dtype());
        return Err(errors::dtype(py, message));
    }
    if untyped.ndim() != 1 {
        let message = format!("{name} has {} dimensions: pass it flat", untyped.ndim());
        return Err(errors::shape(py, message));
    }
    if !untyped.is_c_contiguous() || !untyped.is_aligned() {
        return Err(layout_error(py, name));
    }
    Ok(object.cast::<PyArray1<T>>()?.clone())
}

fn layout_error(py: Python<'_>, name: &str) -> PyErr {
    errors::shape(
        py,
        format!("{name} is not contiguous and aligned in memory: pass a contiguous copy of it"),
    )
}

fn borrow_error<T: Element>(
    array: &Bound<'_, PyArray1<T>>,
    name: &str,
    error: &BorrowError,
) -> PyErr {
    let message = match error {
        BorrowError::NotWriteable => format!("{name} is read-only: pass an array to write to"),
        _ => format!("{name} shares memory with another array in use: pass an array of its own"),
    };
    errors::shape(array.py(), message)
}

fn unknown_dtype(py: Python<'_>, dtype: &str) -> PyErr {
    errors::dtype(
        py,
        format!("values of dtype {dtype:?}: allowed are float32, float16 and bfloat16"),
    )
}
