//! What is to be done: tensors, where they lie, and what becomes of them.

use qkern_codec::{num_blocks, packed_len, CodecError, NESTED_BLOCKSIZE};

use crate::error::CheckpointError;

/// A place in one of the files of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of the file among the inputs or outputs.
    pub file: usize,
    /// Bytes from its start.
    pub offset: u64,
}

/// The dtypes that have a codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// As torch calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// How the codes of a quantized tensor are read.
#[derive(Clone, Debug)]
pub struct Format {
    /// The 16 values of a 4-bit format; `None` for 8-bit integers.
    pub code: Option<[f32; 16]>,
    /// Values that share a scale; those of a row where `per_row`.
    pub blocksize: usize,
    /// Whether a block is a row, of any length: integers alone.
    pub per_row: bool,
    /// The 256 values of a double-quantized scale; `None` for fp32 scales.
    pub nested_code: Option<Box<[f32; 256]>>,
}

impl Format {
    /// Bytes of the codes of so many values.
    pub fn packed_size(&self, numel: usize) -> usize {
        match self.code {
            Some(_) => packed_len(numel),
            None => numel,
        }
    }

    /// Scales of so many values.
    pub fn num_blocks(&self, numel: usize) -> usize {
        num_blocks(numel, self.blocksize)
    }
}

/// Values or codes that are read.
#[derive(Clone, Debug)]
pub enum Source {
    /// Values in row-major order.
    Dense {
        /// What they are.
        dtype: Dtype,
        /// The first of them.
        at: Span,
    },
    /// Codes and scales.
    Quantized(Stored),
    /// Codes and scales as MXFP4 and NVFP4 store them.
    Blocks(Blocks),
}

/// Codes of E2M1, the first of two in the low half of a byte, with a scale of 8 bits a block. Blocks
/// do not cross rows.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// The first code.
    pub codes: Span,
    /// The first scale.
    pub scales: Span,
    /// Values that share a scale.
    pub blocksize: usize,
    /// What a scale is.
    pub scale: Scale,
}

/// A scale of 8 bits.
#[derive(Clone, Copy, Debug)]
pub enum Scale {
    /// A power of two.
    E8m0,
    /// A small float, `* factor / divisor` in fp32.
    E4m3 {
        /// Of the tensor.
        factor: f32,
        /// Of the tensor.
        divisor: f32,
    },
}

/// A quantized tensor in a file.
#[derive(Clone, Debug)]
pub struct Stored {
    /// How it is read.
    pub format: Format,
    /// The first code.
    pub codes: Span,
    /// The first scale: fp32, or 8-bit codes.
    pub scales: Span,
    /// The first second-level scale, of double-quantized ones.
    pub nested: Span,
    /// Mean of double-quantized scales.
    pub offset: f32,
}

/// What is written.
#[derive(Clone, Debug)]
pub enum Target {
    /// Values in row-major order, rounded once.
    Dense {
        /// What they are.
        dtype: Dtype,
        /// The first of them.
        at: Span,
    },
    /// Codes and scales.
    Quantized(Coded),
}

/// A quantized tensor to be written.
#[derive(Clone, Debug)]
pub struct Coded {
    /// How it will be read. 8-bit scales are given up where they cannot hold the tensor's.
    pub format: Format,
    /// The first code.
    pub codes: Span,
    /// The first scale: fp32, or 8-bit codes and behind them the second-level scales.
    pub scales: Span,
    /// Whether scales of least squared error are searched for, of a 4-bit format.
    pub search: bool,
    /// Whether errors are measured.
    pub measure: bool,
}

/// A tensor and what becomes of it.
#[derive(Clone, Debug)]
pub enum Job {
    /// Its bytes go over as they are, or each by itself as something else.
    Copy {
        /// Name, for errors.
        name: String,
        /// How many bytes are read.
        nbytes: u64,
        /// What they become.
        change: Change,
        /// Where they lie.
        source: Span,
        /// Where they go.
        target: Span,
    },
    /// It changes its form.
    Weight(Box<Weight>),
}

/// What bytes that are copied become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// What they are.
    None,
    /// Bytes with their halves exchanged.
    SwappedNibbles,
    /// fp32, of scales that are powers of two.
    E8m0ToF32,
}

impl Change {
    /// Bytes that are written for each one.
    pub(super) fn growth(self) -> u64 {
        match self {
            Self::None | Self::SwappedNibbles => 1,
            Self::E8m0ToF32 => 4,
        }
    }
}

/// A tensor that changes its form.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Name, for errors.
    pub name: String,
    /// How many values.
    pub numel: usize,
    /// Values of a row: of the last dimension.
    pub row: usize,
    /// What is read.
    pub source: Source,
    /// What is added to it.
    pub delta: Option<Delta>,
    /// Rows of each of its matrices, which a dense target holds transposed; of the one matrix that
    /// a quantized target holds so. A thread needs memory for one of them.
    pub transposed: Option<usize>,
    /// What is written.
    pub target: Target,
}

/// A product of low rank that is added to a weight: `w[i, j] += sum over r of b[i, r] a[r, j]`, in
/// fp32. Of stacked matrices each has an `a` of its own.
#[derive(Clone, Debug)]
pub struct Delta {
    /// `(matrices, rank, row)`, row-major.
    pub a: Vec<f32>,
    /// `(numel / row, rank)`, row-major, with all factors in it.
    pub b: Vec<f32>,
    /// What a quantized weight is rounded to before: the weight that the adapter was trained on.
    pub base: Dtype,
    /// How many matrices of the same rows the weight is; 1 if it is one.
    pub matrices: usize,
}

impl Weight {
    /// The codec's error, with the tensor's name.
    pub(super) fn refused(&self, source: CodecError) -> CheckpointError {
        CheckpointError::Tensor { name: self.name.clone(), source }
    }
}

impl Job {
    /// Name of the tensor.
    pub fn name(&self) -> &str {
        match self {
            Self::Copy { name, .. } => name,
            Self::Weight(weight) => &weight.name,
        }
    }
}

/// Sums over the values whose errors were measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// How many values.
    pub count: u64,
    /// Sum of their squares.
    pub squared: f64,
    /// Sum of the squares of their errors.
    pub squared_error: f64,
    /// The largest magnitude of an error.
    pub max_error: f64,
    /// Sum of the squares of what was added.
    pub squared_delta: f64,
}

/// What became of a job. Checksums are CRC-32 of what was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// Index of the job.
    pub job: usize,
    /// Whether the scales of the target are double-quantized.
    pub double_quant: bool,
    /// Mean of double-quantized scales.
    pub offset: f32,
    /// Of the codes, or of everything.
    pub crc: u32,
    /// Of the scales, second-level ones included.
    pub crc_scales: u32,
    /// Of quantizing, if measured.
    pub errors: Option<Errors>,
}

/// Second-level scales of so many scales.
pub(super) fn num_groups(blocks: usize) -> usize {
    blocks.div_ceil(NESTED_BLOCKSIZE)
}
