//! Checkpoints in bounded memory: safetensors in, quantized safetensors out.
//!
//! - [`Checkpoint`]: the files of a checkpoint and their headers, checked before they are believed.
//! - [`stream`]: weights read, converted and written in chunks, by several threads, each value at a
//!   place that is known beforehand.
//!
//! No Python, and no policy: which tensors, in what format and under what names is the caller's.

#![deny(missing_docs)]
#![deny(unsafe_code)] // but for mapping a file

#[cfg(target_endian = "big")]
compile_error!("files are little-endian, and their bytes are used as they are");

mod error;
mod files;
pub mod header;
pub mod index;
pub mod stream;

pub use error::CheckpointError;
pub use files::Stamp;
pub use header::Header;
pub use index::Checkpoint;
