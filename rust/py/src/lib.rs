//! `qkern._native`: the codec for Python.
//!
//! Checks arrays, lends them to `qkern-codec` as slices and turns its errors into the classes of
//! `qkern.errors`. It computes nothing.

mod arrays;
mod buffer;
mod checkpoint;
mod detached;
mod errors;
mod functions;
mod linear;
mod pages;
mod patterns;
mod scales;
mod stream;

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

/// Quantize and dequantize on the host; see `qkern.codec` for the public functions.
// Free-threaded Python, where this has not been tried, turns its GIL on for this module.
#[pymodule(gil_used = true)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::buffer::Buffer;

    #[pymodule_export]
    use crate::checkpoint::read_checkpoint;

    #[pymodule_export]
    use crate::functions::{
        _panic, available_simd, cpu_features, dequantize_4bit, dequantize_absmax, dequantize_int8,
        encode_4bit, quantize_4bit, quantize_absmax, quantize_int8, quantize_int8_rows,
        search_scales, simd,
    };

    #[pymodule_export]
    use crate::linear::{linear, linear_backward, lora_gradients};

    #[pymodule_export]
    use crate::pages::advise_huge_pages;

    #[pymodule_export]
    use crate::patterns::match_paths;

    #[pymodule_export]
    use crate::stream::run_jobs;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::check_interpreter(module.py())?;
        crate::detached::keep_panics();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

/// Refuses sub-interpreters: what is imported once and kept belongs to the main one.
fn check_interpreter(py: Python<'_>) -> PyResult<()> {
    /// The number of the main interpreter.
    const MAIN: i64 = 0;

    // SAFETY: this thread is attached to an interpreter, as `py` shows.
    let interpreter = unsafe { pyo3::ffi::PyInterpreterState_Get() };
    // SAFETY: the interpreter was just returned and is running this.
    let found = unsafe { pyo3::ffi::PyInterpreterState_GetID(interpreter) };
    match (found, PyErr::take(py)) {
        (MAIN, _) => Ok(()),
        (_, Some(error)) => Err(error),
        _ => {
            let advice = "import it in the main interpreter, or use a process for each";
            let message = format!("qkern does not support sub-interpreters: {advice}");
            Err(PyImportError::new_err(message))
        }
    }
}
