//! Products of bfloat16 on the tiles of AMX, sums in fp32.
//!
//! ```text
//! forward    sums (rows of W, tokens)      =  W tile (16 rows, 32 columns)  x  pairs of x
//! backward   sums (tokens, columns of W)   =  dY tile (16 tokens, 32 rows)  x  pairs of W
//! ```
//!
//! A tile instruction multiplies 16 rows of 32 values with 16 columns of as many, which lie in
//! pairs: row p of the right tile holds values 2 p and 2 p + 1 of each column. Codes are decoded
//! straight into tiles that stay in the cache of the core; the other factor is packed once a call.
//! W is the weight rounded to bfloat16, exactly as `dequantize` gives it; tiles take subnormal
//! numbers as zero.

mod backward;
mod forward;
mod int8;
mod lora;
mod pack;
mod tiles;
mod transpose;

pub(crate) use backward::backward;
pub(crate) use forward::forward;
pub(crate) use int8::forward as forward_int8;
pub(crate) use lora::{gradient, thin};
#[cfg(test)]
mod tests;
pub(crate) use tiles::granted;

use crate::linear::weight::Weight;

/// The work of a product in values to quantize, in which threads are counted: a weight costs as
/// much as 28 products to read and decode.
fn work(weight: &Weight<'_>, tokens: usize) -> usize {
    weight.rows.saturating_mul(weight.cols).saturating_mul(tokens + 28) / 100
}
