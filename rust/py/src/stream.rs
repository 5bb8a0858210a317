//! Jobs of `qkern.checkpoint.stream` for the engine, and its news for Python.

use std::path::PathBuf;

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use qkern_checkpoint::stream::{
    run, Access, Blocks, Change, Coded, Continue, Delta, Done, Dtype, Errors, Format, Job,
    Observer, Scale, Source, Span, Stored, Target, Weight,
};

use crate::detached::caught;
use crate::{errors, functions};

/// `(file, offset)`.
type SpanArgument = (usize, u64);

#[derive(FromPyObject)]
struct KindArgument {
    per_row: bool,
}

/// A `QuantFormat`.
#[derive(FromPyObject)]
struct FormatArgument {
    code: Option<Vec<f32>>,
    blocksize: usize,
    double_quant: bool,
    kind: KindArgument,
}

#[derive(FromPyObject)]
enum SideArgument {
    Quantized {
        format: FormatArgument,
        codes: SpanArgument,
        scales: SpanArgument,
        nested: Option<SpanArgument>,
        offset: f32,
    },
    Blocks {
        codes: SpanArgument,
        scales: SpanArgument,
        blocksize: usize,
        scale: String,
        factor: f32,
        divisor: f32,
    },
    Dense {
        dtype: String,
        at: SpanArgument,
    },
}

#[derive(FromPyObject)]
struct DeltaArgument {
    a: Py<PyArray1<f32>>,
    b: Py<PyArray1<f32>>,
    base: String,
    matrices: usize,
}

#[derive(FromPyObject)]
#[allow(clippy::large_enum_variant)] // one at a time
enum JobArgument {
    Copy {
        name: String,
        nbytes: u64,
        source: SpanArgument,
        target: SpanArgument,
        change: Option<String>,
    },
    Weight {
        name: String,
        shape: Vec<usize>,
        source: SideArgument,
        delta: Option<DeltaArgument>,
        target: SideArgument,
        method: String,
        measure: bool,
        transposed: bool,
    },
}

/// Runs jobs; calls `done` with a tuple of each one's results, and `progress` with bytes read.
#[pyfunction]
#[pyo3(signature = (jobs, inputs, outputs, nested_code, done, progress, *, mapped=false, threads=0, simd=None))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // as Python passes them
pub(crate) fn run_jobs(
    py: Python<'_>,
    jobs: Vec<Bound<'_, PyAny>>,
    inputs: Vec<PathBuf>,
    outputs: Vec<PathBuf>,
    nested_code: PyReadonlyArray1<'_, f32>,
    done: Py<PyAny>,
    progress: Py<PyAny>,
    mapped: bool,
    threads: usize,
    simd: Option<&str>,
) -> PyResult<()> {
    let access = if mapped { Access::Mapped } else { Access::Copied };
    let engine = functions::engine(py, threads, simd)?;
    let found = nested_code.len();
    let nested_code: [f32; 256] = nested_code
        .as_slice()?
        .try_into()
        .map_err(|_| errors::shape(py, format!("nested_code has {found} values: pass 256")))?;
    let jobs = jobs
        .iter()
        .map(|job| convert(py, job.extract()?, &nested_code))
        .collect::<PyResult<Vec<_>>>()?;
    let mut watcher = Watcher { done, progress, raised: None };
    let result = caught(py, || run(&jobs, &inputs, &outputs, engine, access, &mut watcher))?;
    match (result, watcher.raised) {
        (_, Some(raised)) => Err(raised),
        (Ok(()), None) => Ok(()),
        (Err(error), None) => Err(errors::checkpoint(py, &error)),
    }
}

/// Passes news on to Python, and its exceptions back.
struct Watcher {
    done: Py<PyAny>,
    progress: Py<PyAny>,
    raised: Option<PyErr>,
}

impl Watcher {
    fn tell(&mut self, tell: impl FnOnce(&Self, Python<'_>) -> PyResult<()>) -> Continue {
        // At the end of the interpreter there is nobody to tell.
        match Python::try_attach(|py| tell(self, py)) {
            Some(Ok(())) => Continue::Yes,
            Some(Err(raised)) => {
                self.raised = Some(raised);
                Continue::No
            }
            None => Continue::No,
        }
    }
}

impl Observer for Watcher {
    fn done(&mut self, done: Done) -> Continue {
        let Done { job, double_quant, offset, crc, crc_scales, errors } = done;
        let errors = errors.map(|errors| {
            let Errors { count, squared, squared_error, max_error, squared_delta } = errors;
            (count, squared, squared_error, max_error, squared_delta)
        });
        self.tell(|watcher, py| {
            let news = (job, double_quant, offset, crc, crc_scales, errors);
            watcher.done.call1(py, (news,)).map(drop)
        })
    }

    fn progress(&mut self, bytes: u64) -> Continue {
        self.tell(|watcher, py| {
            py.check_signals()?;
            match bytes {
                0 => Ok(()),
                _ => watcher.progress.call1(py, (bytes,)).map(drop),
            }
        })
    }
}

fn convert(py: Python<'_>, job: JobArgument, nested_code: &[f32; 256]) -> PyResult<Job> {
    match job {
        JobArgument::Copy { name, nbytes, source, target, change } => {
            let change = match change.as_deref() {
                None => Change::None,
                Some("swapped_nibbles") => Change::SwappedNibbles,
                Some("e8m0_to_float32") => Change::E8m0ToF32,
                Some(other) => return Err(errors::format(py, format!("unknown change {other:?}"))),
            };
            Ok(Job::Copy { name, nbytes, change, source: span(source), target: span(target) })
        }
        JobArgument::Weight { name, shape, source, delta, target, method, measure, transposed } => {
            let numel = shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
            let numel = numel.filter(|numel| isize::try_from(*numel).is_ok()).ok_or_else(|| {
                errors::shape(py, format!("{name}: {shape:?} are more values than there can be"))
            })?;
            let row = shape.last().copied().unwrap_or(1).max(1);
            // Of the matrices that its last two dimensions are.
            let transposed = transposed.then(|| shape.iter().rev().nth(1).copied().unwrap_or(1));
            let target = convert_target(py, target, &method, measure, nested_code)?;
            let source = convert_source(py, source, nested_code)?;
            let delta = delta.map(|delta| convert_delta(py, &delta)).transpose()?;
            Ok(Job::Weight(Box::new(Weight {
                name,
                numel,
                row,
                source,
                delta,
                transposed,
                target,
            })))
        }
    }
}

fn convert_delta(py: Python<'_>, delta: &DeltaArgument) -> PyResult<Delta> {
    let [a, b] = [&delta.a, &delta.b].map(|values| values.bind(py).to_vec());
    let base = named_dtype(py, &delta.base)?;
    Ok(Delta { a: a?, b: b?, base, matrices: delta.matrices })
}

fn convert_source(
    py: Python<'_>,
    side: SideArgument,
    nested_code: &[f32; 256],
) -> PyResult<Source> {
    Ok(match side {
        SideArgument::Dense { dtype, at } => {
            Source::Dense { dtype: named_dtype(py, &dtype)?, at: span(at) }
        }
        SideArgument::Quantized { format, codes, scales, nested, offset } => {
            Source::Quantized(Stored {
                format: convert_format(py, format, nested_code)?,
                codes: span(codes),
                scales: span(scales),
                nested: span(nested.unwrap_or(scales)),
                offset,
            })
        }
        SideArgument::Blocks { codes, scales, blocksize, scale, factor, divisor } => {
            let scale = match scale.as_str() {
                "e8m0" => Scale::E8m0,
                "e4m3" => Scale::E4m3 { factor, divisor },
                _ => return Err(errors::format(py, format!("unknown scale {scale:?}"))),
            };
            let (codes, scales) = (span(codes), span(scales));
            Source::Blocks(Blocks { codes, scales, blocksize, scale })
        }
    })
}

fn convert_target(
    py: Python<'_>,
    side: SideArgument,
    method: &str,
    measure: bool,
    nested_code: &[f32; 256],
) -> PyResult<Target> {
    Ok(match side {
        SideArgument::Dense { dtype, at } => {
            Target::Dense { dtype: named_dtype(py, &dtype)?, at: span(at) }
        }
        SideArgument::Quantized { format, codes, scales, .. } => Target::Quantized(Coded {
            format: convert_format(py, format, nested_code)?,
            codes: span(codes),
            scales: span(scales),
            search: match method {
                "absmax" => false,
                "search" => true,
                _ => return Err(errors::format(py, format!("unknown method {method:?}"))),
            },
            measure,
        }),
        SideArgument::Blocks { .. } => {
            return Err(errors::format(py, "blocks are read, and not written".to_owned()))
        }
    })
}

fn convert_format(
    py: Python<'_>,
    format: FormatArgument,
    nested_code: &[f32; 256],
) -> PyResult<Format> {
    let FormatArgument { code, blocksize, double_quant, kind } = format;
    let code = code.map(|code| {
        <[f32; 16]>::try_from(code).map_err(|code| {
            errors::format(py, format!("a table of {} codes: 16 are needed", code.len()))
        })
    });
    Ok(Format {
        code: code.transpose()?,
        blocksize,
        per_row: kind.per_row,
        nested_code: double_quant.then(|| Box::new(*nested_code)),
    })
}

fn span((file, offset): SpanArgument) -> Span {
    Span { file, offset }
}

fn named_dtype(py: Python<'_>, name: &str) -> PyResult<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype.name() == name).ok_or_else(
        || errors::dtype(py, format!("{name}: allowed are float32, float16 and bfloat16")),
    )
}
