//! Memory that is given by its address.
//!
//! For tensors on the CPU: a `NumPy` array for each part of a weight takes longer than a small
//! product does.

use std::ops::Range;
use std::slice;

use pyo3::prelude::*;

use crate::errors;

/// Contiguous memory of a tensor, which it keeps alive.
///
/// Nothing can check an address: it must be that of `len` aligned elements of `dtype`, which no
/// other thread changes until the call that the buffer is for has returned.
#[pyclass(frozen, module = "qkern._native")]
pub(crate) struct Buffer {
    address: usize,
    len: usize,
    dtype: DType,
    _owner: Py<PyAny>,
}

/// What the elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DType {
    Float32,
    UInt16,
    UInt8,
    Int8,
}

/// A type of elements.
pub(crate) trait Stored {
    const DTYPE: DType;
}

impl Stored for f32 {
    const DTYPE: DType = DType::Float32;
}

impl Stored for u16 {
    const DTYPE: DType = DType::UInt16;
}

impl Stored for u8 {
    const DTYPE: DType = DType::UInt8;
}

impl Stored for i8 {
    const DTYPE: DType = DType::Int8;
}

impl DType {
    const ALL: [Self; 4] = [Self::Float32, Self::UInt16, Self::UInt8, Self::Int8];

    fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::UInt16 => "uint16",
            Self::UInt8 => "uint8",
            Self::Int8 => "int8",
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::UInt16 => 2,
            Self::UInt8 | Self::Int8 => 1,
        }
    }
}

#[pymethods]
impl Buffer {
    #[new]
    fn new(
        py: Python<'_>,
        address: usize,
        numel: usize,
        dtype: &str,
        owner: Py<PyAny>,
    ) -> PyResult<Self> {
        let Some(dtype) = DType::ALL.into_iter().find(|known| known.name() == dtype) else {
            let message =
                format!("a buffer of {dtype}: allowed are float32, uint16, uint8 and int8");
            return Err(errors::dtype(py, message));
        };
        let bytes = numel.checked_mul(dtype.size()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let end = bytes.and_then(|bytes| address.checked_add(bytes));
        let valid = numel == 0 || (address != 0 && address.is_multiple_of(dtype.size()));
        if !valid || end.is_none() {
            let name = dtype.name();
            let message = format!("no {numel} aligned values of {name} can be at {address:#x}");
            return Err(errors::shape(py, message));
        }
        Ok(Self { address, len: numel, dtype, _owner: owner })
    }

    /// Elements, as an array calls them.
    #[getter]
    fn size(&self) -> usize {
        self.len
    }
}

impl Buffer {
    /// Refuses another type than that of the buffer.
    pub(crate) fn check<T: Stored>(&self, name: &str, py: Python<'_>) -> PyResult<()> {
        if self.dtype == T::DTYPE {
            return Ok(());
        }
        let (found, needed) = (self.dtype.name(), T::DTYPE.name());
        Err(errors::dtype(py, format!("{name} has dtype {found}: pass {needed}")))
    }

    pub(crate) fn bytes(&self) -> Range<usize> {
        self.address..self.address + self.len * self.dtype.size()
    }

    /// # Safety
    /// The elements are of type `T`, the memory is what the buffer was made for, and nobody writes
    /// to it meanwhile.
    pub(crate) unsafe fn slice<T: Stored>(&self) -> &[T] {
        debug_assert_eq!(self.dtype, T::DTYPE);
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `new` checked alignment and size, the caller vouches for the rest.
        unsafe { slice::from_raw_parts(self.address as *const T, self.len) }
    }

    /// # Safety
    /// As for `slice`, and nobody reads the memory or has another slice of it.
    #[allow(clippy::mut_from_ref)] // the buffer does not own what it points to
    pub(crate) unsafe fn slice_mut<T: Stored>(&self) -> &mut [T] {
        debug_assert_eq!(self.dtype, T::DTYPE);
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: `new` checked alignment and size, the caller vouches for the rest.
        unsafe { slice::from_raw_parts_mut(self.address as *mut T, self.len) }
    }
}
