//! `qkern._native`: the codec for Python.
//!
//! Checks arrays, lends them to `qkern-codec` as slices and turns its errors into the classes of
//! `qkern.errors`. It computes nothing.

mod arrays;
mod errors;
mod functions;

use pyo3::prelude::*;

/// Quantize and dequantize on the host; see `qkern.codec` for the public functions.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::functions::{
        available_simd, cpu_features, dequantize_4bit, dequantize_absmax, dequantize_int8,
        quantize_4bit, quantize_absmax, quantize_int8, quantize_int8_rows, simd,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
