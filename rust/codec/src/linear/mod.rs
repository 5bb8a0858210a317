//! Linear layers on packed weights: no dense copy of W, of any size.
//!
//! ```text
//! forward    h = scaling * x A^T      (M, r)        fp32
//!            y = x W^T + h B^T + bias (M, N)        fp32 sums, rounded once to y's dtype
//! backward   dX = dY W + G A          (M, K)        G = scaling * dY B, (M, r)
//! ```
//!
//! M tokens, N rows of W (out-features), K columns (in-features), r the rank of the adapter.
//!
//! A thread takes a strip of W's rows, decodes it into scratch that stays in its cache, multiplies
//! it with all of x and goes on. W is what `dequantize` gives in x's dtype, with one exception:
//! the product of a few tokens ([`matvec`]) multiplies codes and scales in fp32 and never rounds a
//! weight to 16 bits, so that each weight is within half an ulp of that.
//! Sums run over K in an order that depends on the shape and the body alone: the same bytes come
//! out for any number of threads.

mod adapter;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod avx512;
mod backward;
pub(crate) mod dense;
mod epilogue;
mod forward;
#[cfg(test)]
mod gradient_tests;
mod lora;
pub(crate) mod matvec;
mod pieces;
#[cfg(test)]
mod shape_tests;
mod strips;
#[cfg(test)]
pub(crate) mod tests;
mod weight;

pub use adapter::Lora;
pub use backward::linear_backward;
pub(crate) use backward::Adapter;
pub(crate) use epilogue::Epilogue;
pub(crate) use forward::TileInput;
pub use forward::{linear, Compute};
pub use lora::lora_gradients;
pub use weight::{Codes, Weight};
