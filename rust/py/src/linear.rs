//! Linear layers on packed weights, as functions of `qkern._native`.

use pyo3::prelude::*;
use qkern_codec::{Codes, Compute, Lora, Weight};

use crate::arrays::{check_apart, table, Input, InputValues, Memory, Output, OutputValues};
use crate::detached::detached;
use crate::errors;
use crate::functions::engine;
use crate::scales::{Nested, ScaleArray};

/// Writes `y = x W^T + bias`, and the adapter's part.
#[pyfunction]
#[pyo3(signature = (
    x, dtype, packed, code, absmax, nested_code, nested_absmax, offset, blocksize, rows, cols, y, *,
    bias=None, lora_a=None, lora_b=None, lora_dtype="float32", scaling=1.0, compute="exact",
    threads=0, simd=None
))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn linear(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    dtype: &str,
    packed: &Bound<'_, PyAny>,
    code: Option<&Bound<'_, PyAny>>,
    absmax: &Bound<'_, PyAny>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    offset: Option<&Bound<'_, PyAny>>,
    blocksize: usize,
    rows: usize,
    cols: usize,
    y: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    lora_a: Option<&Bound<'_, PyAny>>,
    lora_b: Option<&Bound<'_, PyAny>>,
    lora_dtype: &str,
    scaling: f32,
    compute: &str,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let compute = match compute {
        "exact" => Compute::Exact,
        "int8" => Compute::Int8,
        _ => {
            let message = format!("compute is {compute:?}: allowed are \"exact\" and \"int8\"");
            return Err(errors::format(py, message));
        }
    };
    let parts = Parts::new(packed, code, absmax, [nested_code, nested_absmax, offset])?;
    let x = InputValues::new(x, dtype)?;
    let bias = bias.map(|bias| Input::<f32>::new("bias", bias)).transpose()?;
    let adapter = Adapter::new(py, (lora_a, lora_b, lora_dtype), scaling, (rows, cols))?;
    let mut y = OutputValues::new(y, dtype)?;
    let mut inputs = vec![x.memory()];
    inputs.extend(parts.memory());
    inputs.extend(bias.as_ref().map(Input::memory));
    inputs.extend(adapter.iter().flat_map(Adapter::memory));
    check_apart(py, &[y.memory()], &inputs)?;

    let weight = parts.weight(blocksize, rows, cols)?;
    let bias = bias.as_ref().map(Input::slice).transpose()?;
    let lora = adapter.as_ref().map(Adapter::lora).transpose()?;
    let (x, y) = (x.slice()?, y.slice()?);
    detached(py, || qkern_codec::linear(engine, x, &weight, bias, lora, compute, y))
}

/// Writes `dx = grad W`, and the adapter's part.
#[pyfunction]
#[pyo3(signature = (
    grad, dtype, packed, code, absmax, nested_code, nested_absmax, offset, blocksize, rows, cols,
    dx, *, lora_a=None, lora_b=None, lora_dtype="float32", scaling=1.0, threads=0, simd=None
))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn linear_backward(
    py: Python<'_>,
    grad: &Bound<'_, PyAny>,
    dtype: &str,
    packed: &Bound<'_, PyAny>,
    code: Option<&Bound<'_, PyAny>>,
    absmax: &Bound<'_, PyAny>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    offset: Option<&Bound<'_, PyAny>>,
    blocksize: usize,
    rows: usize,
    cols: usize,
    dx: &Bound<'_, PyAny>,
    lora_a: Option<&Bound<'_, PyAny>>,
    lora_b: Option<&Bound<'_, PyAny>>,
    lora_dtype: &str,
    scaling: f32,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let parts = Parts::new(packed, code, absmax, [nested_code, nested_absmax, offset])?;
    let grad = InputValues::new(grad, dtype)?;
    let adapter = Adapter::new(py, (lora_a, lora_b, lora_dtype), scaling, (rows, cols))?;
    let mut dx = OutputValues::new(dx, dtype)?;
    let mut inputs = vec![grad.memory()];
    inputs.extend(parts.memory());
    inputs.extend(adapter.iter().flat_map(Adapter::memory));
    check_apart(py, &[dx.memory()], &inputs)?;

    let weight = parts.weight(blocksize, rows, cols)?;
    let lora = adapter.as_ref().map(Adapter::lora).transpose()?;
    let (grad, dx) = (grad.slice()?, dx.slice()?);
    detached(py, || qkern_codec::linear_backward(engine, grad, &weight, lora, dx))
}

/// Writes the gradients of an adapter, in fp32.
#[pyfunction]
#[pyo3(signature = (
    x, grad, dtype, lora_a, lora_b, lora_dtype, rank, scaling, *,
    grad_a=None, grad_b=None, threads=0, simd=None
))]
#[allow(clippy::too_many_arguments)] // the signature that Python sees
pub(crate) fn lora_gradients(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    dtype: &str,
    lora_a: &Bound<'_, PyAny>,
    lora_b: &Bound<'_, PyAny>,
    lora_dtype: &str,
    rank: usize,
    scaling: f32,
    grad_a: Option<&Bound<'_, PyAny>>,
    grad_b: Option<&Bound<'_, PyAny>>,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let engine = engine(py, threads, simd)?;
    let (x, grad) = (InputValues::new(x, dtype)?, InputValues::new(grad, dtype)?);
    let a = InputValues::named("lora_a", lora_a, lora_dtype)?;
    let b = InputValues::named("lora_b", lora_b, lora_dtype)?;
    let adapter = Adapter { a, b, rank, scaling };
    let mut grad_a = grad_a.map(|to| Output::<f32>::new("grad_a", to)).transpose()?;
    let mut grad_b = grad_b.map(|to| Output::<f32>::new("grad_b", to)).transpose()?;
    let outputs = [grad_a.as_ref().map(Output::memory), grad_b.as_ref().map(Output::memory)];
    let outputs: Vec<_> = outputs.into_iter().flatten().collect();
    let mut inputs = vec![x.memory(), grad.memory()];
    inputs.extend(adapter.memory());
    check_apart(py, &outputs, &inputs)?;

    let lora = adapter.lora()?;
    let (x, grad) = (x.slice()?, grad.slice()?);
    let da = grad_a.as_mut().map(Output::slice).transpose()?;
    let db = grad_b.as_mut().map(Output::slice).transpose()?;
    detached(py, || qkern_codec::lora_gradients(engine, x, grad, lora, da, db))
}

/// The arrays of a quantized weight.
struct Parts<'py> {
    codes: CodeArray<'py>,
    scales: ScaleArray<'py>,
}

enum CodeArray<'py> {
    FourBit { packed: Input<'py, u8>, table: [f32; 16] },
    Int8(Input<'py, i8>),
}

impl<'py> Parts<'py> {
    fn new(
        packed: &Bound<'py, PyAny>,
        code: Option<&Bound<'py, PyAny>>,
        absmax: &Bound<'py, PyAny>,
        nested: Nested<'_, 'py>,
    ) -> PyResult<Self> {
        let codes = match code {
            Some(code) => CodeArray::FourBit {
                packed: Input::new("packed", packed)?,
                table: table("code", code)?,
            },
            None => CodeArray::Int8(Input::new("packed", packed)?),
        };
        Ok(Self { codes, scales: ScaleArray::new(absmax, nested)? })
    }

    fn memory(&self) -> Vec<Memory> {
        let codes = match &self.codes {
            CodeArray::FourBit { packed, .. } => packed.memory(),
            CodeArray::Int8(codes) => codes.memory(),
        };
        let mut memory = vec![codes];
        memory.extend(self.scales.memory());
        memory
    }

    fn weight(&self, blocksize: usize, rows: usize, cols: usize) -> PyResult<Weight<'_>> {
        let codes = match &self.codes {
            CodeArray::FourBit { packed, table } => {
                Codes::FourBit { packed: packed.slice()?, table }
            }
            CodeArray::Int8(codes) => Codes::Int8(codes.slice()?),
        };
        let scales = self.scales.scales()?;
        Ok(Weight { codes, scales, blocksize, rows, cols })
    }
}

/// The arrays of an adapter.
struct Adapter<'py> {
    a: InputValues<'py>,
    b: InputValues<'py>,
    rank: usize,
    scaling: f32,
}

impl<'py> Adapter<'py> {
    /// Both matrices or none; the rank follows from their sizes and the weight's.
    fn new(
        py: Python<'py>,
        (a, b, dtype): (Option<&Bound<'py, PyAny>>, Option<&Bound<'py, PyAny>>, &str),
        scaling: f32,
        (rows, cols): (usize, usize),
    ) -> PyResult<Option<Self>> {
        let (a, b) = match (a, b) {
            (None, None) => return Ok(None),
            (Some(a), Some(b)) => {
                let a = InputValues::named("lora_a", a, dtype)?;
                (a, InputValues::named("lora_b", b, dtype)?)
            }
            _ => {
                let message = "an adapter is lora_a and lora_b: pass both, or neither";
                return Err(errors::shape(py, message.to_owned()));
            }
        };
        let of_a = a.slice()?.len().checked_div(cols);
        let rank = of_a.or(b.slice()?.len().checked_div(rows)).unwrap_or(0);
        Ok(Some(Self { a, b, rank, scaling }))
    }

    fn memory(&self) -> Vec<Memory> {
        vec![self.a.memory(), self.b.memory()]
    }

    fn lora(&self) -> PyResult<Lora<'_>> {
        let (a, b) = (self.a.slice()?, self.b.slice()?);
        Ok(Lora { a, b, rank: self.rank, scaling: self.scaling })
    }
}
