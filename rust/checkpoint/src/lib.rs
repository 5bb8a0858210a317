//! Checkpoints in bounded memory: safetensors in, quantized safetensors out.
//!
//! - [`stream`]: weights read, converted and written in chunks, by several threads, each value at a
//!   place that is known beforehand.
//!
//! No Python, and no policy: which tensors, in what format and under what names is the caller's.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod error;

pub use error::CheckpointError;
