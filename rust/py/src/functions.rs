//! The functions of `qkern._native`: arguments checked, GIL released, errors translated.

use pyo3::prelude::*;
use qkern_codec::{Bodies, Codebook, Engine, NonFinite, Stores, ValuesMut};

use crate::arrays::{check_apart, table, Input, InputValues, Output, OutputValues};
use crate::detached::{detached, signal_raised};
use crate::errors;
use crate::scales::ScaleArray;

/// Quantizes `values` to 4-bit codes; writes `packed` and `absmax`.
#[pyfunction]
#[pyo3(signature = (values, dtype, code, blocksize, packed, absmax, *, nonfinite="error", threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn quantize_4bit(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    code: &Bound<'_, PyAny>,
    blocksize: usize,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    nonfinite: &str,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let nonfinite = policy(py, nonfinite)?;
    let code = Codebook::new(&table("code", code)?).map_err(|e| errors::codec(py, &e))?;
    let values = InputValues::new(values, dtype)?;
    let mut packed = Output::<u8>::new("packed", packed)?;
    let mut absmax = Output::<f32>::new("absmax", absmax)?;
    check_apart(py, &[packed.memory(), absmax.memory()], &[values.memory()])?;

    let (values, packed, absmax) = (values.slice()?, packed.slice()?, absmax.slice()?);
    detached(py, || {
        qkern_codec::quantize_4bit(engine, values, &code, blocksize, nonfinite, packed, absmax)
    })
}

/// Finds scales of least squared error for 4-bit codes; writes `absmax`.
#[pyfunction]
#[pyo3(signature = (values, dtype, code, blocksize, absmax, *, importance=None, nonfinite="error", threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn search_scales(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    code: &Bound<'_, PyAny>,
    blocksize: usize,
    absmax: &Bound<'_, PyAny>,
    importance: Option<&Bound<'_, PyAny>>,
    nonfinite: &str,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let nonfinite = policy(py, nonfinite)?;
    let code = Codebook::new(&table("code", code)?).map_err(|e| errors::codec(py, &e))?;
    let values = InputValues::new(values, dtype)?;
    let importance = importance.map(|w| Input::<f32>::new("importance", w)).transpose()?;
    let mut absmax = Output::<f32>::new("absmax", absmax)?;
    let inputs = [Some(values.memory()), importance.as_ref().map(Input::memory)];
    check_apart(py, &[absmax.memory()], &inputs.into_iter().flatten().collect::<Vec<_>>())?;

    let weights = importance.as_ref().map(Input::slice).transpose()?;
    let (values, absmax) = (values.slice()?, absmax.slice()?);
    detached(py, || {
        qkern_codec::search_scales(engine, values, &code, blocksize, weights, nonfinite, absmax)
    })
}

/// Codes `values` against the scales `absmax`, of any sign; writes `packed`.
#[pyfunction]
#[pyo3(signature = (values, dtype, code, blocksize, absmax, packed, *, threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn encode_4bit(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    code: &Bound<'_, PyAny>,
    blocksize: usize,
    absmax: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let code = Codebook::new(&table("code", code)?).map_err(|e| errors::codec(py, &e))?;
    let values = InputValues::new(values, dtype)?;
    let absmax = Input::<f32>::new("absmax", absmax)?;
    let mut packed = Output::<u8>::new("packed", packed)?;
    check_apart(py, &[packed.memory()], &[values.memory(), absmax.memory()])?;

    let (values, absmax, packed) = (values.slice()?, absmax.slice()?, packed.slice()?);
    detached(py, || qkern_codec::encode_4bit(engine, values, &code, blocksize, absmax, packed))
}

/// Writes the `values` of 4-bit codes; `reused` if their memory was in use before.
#[pyfunction]
#[pyo3(signature = (packed, absmax, code, blocksize, values, dtype, *, nested_code=None, nested_absmax=None, offset=None, reused=false, threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn dequantize_4bit(
    py: Python<'_>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    code: &Bound<'_, PyAny>,
    blocksize: usize,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    offset: Option<&Bound<'_, PyAny>>,
    reused: bool,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let code = table("code", code)?;
    let packed = Input::<u8>::new("packed", packed)?;
    let scales = ScaleArray::new(absmax, [nested_code, nested_absmax, offset])?;
    let mut values = OutputValues::new(values, dtype)?;
    let mut inputs = vec![packed.memory()];
    inputs.extend(scales.memory());
    check_apart(py, &[values.memory()], &inputs)?;

    let (packed, scales, values) = (packed.slice()?, scales.scales()?, values.slice()?);
    let stores = stores(reused, &values);
    detached(py, || {
        qkern_codec::dequantize_4bit(engine, packed, scales, &code, blocksize, values, stores)
    })
}

/// Quantizes `values` to 8-bit integers; writes `packed` and `absmax`.
#[pyfunction]
#[pyo3(signature = (values, dtype, blocksize, packed, absmax, *, nonfinite="error", threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn quantize_int8(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    blocksize: usize,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    nonfinite: &str,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let nonfinite = policy(py, nonfinite)?;
    let values = InputValues::new(values, dtype)?;
    let mut packed = Output::<i8>::new("packed", packed)?;
    let mut absmax = Output::<f32>::new("absmax", absmax)?;
    check_apart(py, &[packed.memory(), absmax.memory()], &[values.memory()])?;

    let (values, packed, absmax) = (values.slice()?, packed.slice()?, absmax.slice()?);
    detached(py, || {
        qkern_codec::quantize_int8(engine, values, blocksize, nonfinite, packed, absmax)
    })
}

/// Quantizes rows of `row` values to 8-bit integers; writes `packed` and `absmax`.
#[pyfunction]
#[pyo3(signature = (values, dtype, row, packed, absmax, *, nonfinite="error", threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn quantize_int8_rows(
    py: Python<'_>,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    row: usize,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    nonfinite: &str,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let nonfinite = policy(py, nonfinite)?;
    let values = InputValues::new(values, dtype)?;
    let mut packed = Output::<i8>::new("packed", packed)?;
    let mut absmax = Output::<f32>::new("absmax", absmax)?;
    check_apart(py, &[packed.memory(), absmax.memory()], &[values.memory()])?;

    let (values, packed, absmax) = (values.slice()?, packed.slice()?, absmax.slice()?);
    detached(py, || qkern_codec::quantize_int8_rows(engine, values, row, nonfinite, packed, absmax))
}

/// Writes the `values` of 8-bit integers, in blocks of any length; `reused` if their memory was in
/// use before.
#[pyfunction]
#[pyo3(signature = (packed, absmax, blocksize, values, dtype, *, nested_code=None, nested_absmax=None, offset=None, reused=false, threads=0, simd=None))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn dequantize_int8(
    py: Python<'_>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    blocksize: usize,
    values: &Bound<'_, PyAny>,
    dtype: &str,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    offset: Option<&Bound<'_, PyAny>>,
    reused: bool,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let packed = Input::<i8>::new("packed", packed)?;
    let scales = ScaleArray::new(absmax, [nested_code, nested_absmax, offset])?;
    let mut values = OutputValues::new(values, dtype)?;
    let mut inputs = vec![packed.memory()];
    inputs.extend(scales.memory());
    check_apart(py, &[values.memory()], &inputs)?;

    let (packed, scales, values) = (packed.slice()?, scales.scales()?, values.slice()?);
    let stores = stores(reused, &values);
    detached(py, || qkern_codec::dequantize_int8(engine, packed, scales, blocksize, values, stores))
}

/// Codes scales in 8 bits; writes `codes`, `nested_absmax` and the `offset`, (1,). Returns whether
/// all scales survive.
#[pyfunction]
#[pyo3(signature = (absmax, nested_code, codes, nested_absmax, offset, *, threads=0))]
pub(crate) fn quantize_absmax(
    py: Python<'_>,
    absmax: &Bound<'_, PyAny>,
    nested_code: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    nested_absmax: &Bound<'_, PyAny>,
    offset: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<bool> {
    let engine = engine(py, threads, None)?;
    let absmax = Input::<f32>::new("absmax", absmax)?;
    let table = table("nested_code", nested_code)?;
    let mut codes = Output::<u8>::new("codes", codes)?;
    let mut nested = Output::<f32>::new("nested_absmax", nested_absmax)?;
    let mut offset = Output::<f32>::new("offset", offset)?;
    let outputs = [codes.memory(), nested.memory(), offset.memory()];
    check_apart(py, &outputs, &[absmax.memory()])?;

    let [to] = offset.slice()? else {
        return Err(errors::shape(py, "offset is one value: pass an array of it".to_owned()));
    };
    let (absmax, codes, nested) = (absmax.slice()?, codes.slice()?, nested.slice()?);
    let work = || qkern_codec::quantize_absmax(engine, absmax, &table, codes, nested);
    let scales = detached(py, work)?;
    *to = scales.offset;
    Ok(scales.safe)
}

/// Writes the scales, `absmax`, of 8-bit codes.
#[pyfunction]
#[pyo3(signature = (codes, nested_code, nested_absmax, offset, absmax, *, threads=0))]
pub(crate) fn dequantize_absmax(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    nested_code: &Bound<'_, PyAny>,
    nested_absmax: &Bound<'_, PyAny>,
    offset: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let engine = engine(py, threads, None)?;
    let codes = Input::<u8>::new("codes", codes)?;
    let [offset] = table("offset", offset)?;
    let table = table("nested_code", nested_code)?;
    let nested = Input::<f32>::new("nested_absmax", nested_absmax)?;
    let mut absmax = Output::<f32>::new("absmax", absmax)?;
    check_apart(py, &[absmax.memory()], &[codes.memory(), nested.memory()])?;

    let (codes, nested, absmax) = (codes.slice()?, nested.slice()?, absmax.slice()?);
    detached(py, || qkern_codec::dequantize_absmax(engine, codes, &table, nested, offset, absmax))
}

/// Panics in native work, on a thread of its own unless `threads` is 1: for the tests.
#[pyfunction]
#[pyo3(signature = (message, *, threads=0))]
pub(crate) fn _panic(py: Python<'_>, message: &str, threads: usize) -> PyResult<()> {
    let engine = engine(py, threads, None)?;
    detached(py, || qkern_codec::panic_in_a_job(engine, message))
}

/// Name of the SIMD body in use.
#[pyfunction]
pub(crate) fn simd(py: Python<'_>) -> PyResult<&'static str> {
    Ok(engine(py, 0, None)?.bodies.name())
}

/// Names of the SIMD bodies that this machine can run, best first.
#[pyfunction]
pub(crate) fn available_simd() -> Vec<&'static str> {
    qkern_codec::available().iter().map(|bodies| bodies.name()).collect()
}

/// Which instruction sets this machine has, by name.
#[pyfunction]
pub(crate) fn cpu_features(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    let features = pyo3::types::PyDict::new(py);
    for (name, present) in qkern_codec::cpu_features() {
        features.set_item(name, present)?;
    }
    Ok(features)
}

pub(crate) fn engine(py: Python<'_>, threads: usize, simd: Option<&str>) -> PyResult<Engine> {
    let bodies = match simd {
        Some(name) => Bodies::named(name, "the simd argument"),
        None => Bodies::detect(),
    };
    let bodies = bodies.map_err(|error| errors::codec(py, &error))?;
    Ok(Engine { bodies, threads, interrupted: signal_raised })
}

fn stores(reused: bool, values: &ValuesMut<'_>) -> Stores {
    if reused {
        Stores::for_reused(values)
    } else {
        Stores::Cached
    }
}

fn policy(py: Python<'_>, nonfinite: &str) -> PyResult<NonFinite> {
    match nonfinite {
        "error" => Ok(NonFinite::Error),
        "keep" => Ok(NonFinite::Keep),
        _ => Err(errors::format(
            py,
            format!("nonfinite is {nonfinite:?}: allowed are \"error\" and \"keep\""),
        )),
    }
}
