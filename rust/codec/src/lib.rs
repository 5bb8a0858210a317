//! Quantize and dequantize frozen weights on the host: slices in, slices out.
//!
//! ```text
//! values    | block 0        | block 1        | ... | last block, may be shorter |   f32, f16 or bf16
//! packed    | 2 codes a byte, value 2 i in the high nibble                        |   4-bit formats
//! absmax    | f32            | f32            | ... | f32                         |   one a block
//! ```
//!
//! Blocks of `blocksize` values run over the flat tensor. Each operation has a folder with its
//! dispatcher (`mod.rs`: checks, whole blocks in parallel, the ragged last block) beside its
//! bodies: `scalar.rs`, which runs anywhere and is the reference, and one file per instruction
//! set. Every body gives the same bytes for any length and any number of threads.
//!
//! ```
//! use qkern_codec::{dequantize_4bit, quantize_4bit, Codebook, Engine, NonFinite, Stores};
//! use qkern_codec::{Values, ValuesMut};
//!
//! # fn main() -> Result<(), qkern_codec::CodecError> {
//! let table = core::array::from_fn(|i| (i as f32 - 7.5) / 7.5);
//! let code = Codebook::new(&table)?;
//! let weights = [0.5, -1.0, 0.2];
//! let (mut packed, mut absmax, mut back) = ([0; 2], [0.0; 1], [0.0; 3]);
//!
//! let engine = Engine::detect()?;
//! let values = Values::F32(&weights);
//! quantize_4bit(engine, values, &code, 64, NonFinite::Error, &mut packed, &mut absmax)?;
//! let out = ValuesMut::F32(&mut back);
//! dequantize_4bit(engine, &packed, &absmax, &table, 64, out, Stores::Cached)?;
//! assert_eq!(back, [table[11], -1.0, table[9]]);
//! # Ok(())
//! # }
//! ```

#![deny(missing_docs)]
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // what only some SIMD bodies use
#![deny(unsafe_code)] // but for loads and stores, the table of bodies and the float environment

mod codebook;
mod dequantize;
mod dequantize_int8;
#[allow(unsafe_code)] // gathers
mod double_quant;
mod error;
mod features;
mod float_env;
mod layout;
mod linear;
#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
mod neon;
#[cfg(test)]
mod oracle;
mod parallel;
#[allow(unsafe_code)]
mod plain;
mod pool;
mod quantize;
mod quantize_int8;
mod quantize_int8_rows;
mod scales;
mod scratch;
mod search;
mod simd;
#[cfg(test)]
mod testing;
mod values;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

pub use codebook::Codebook;
pub use dequantize::dequantize_4bit;
pub use dequantize_int8::dequantize_int8;
pub use double_quant::{dequantize_absmax, quantize_absmax, NestedScales, NESTED_BLOCKSIZE};
pub use error::CodecError;
pub use features::cpu_features;
pub use layout::{num_blocks, packed_len, MAX_BLOCKSIZE, MIN_BLOCKSIZE};
pub use linear::{linear, linear_backward, lora_gradients, Codes, Compute, Lora, Weight};
#[doc(hidden)]
pub use parallel::panic_in_a_job;
#[doc(hidden)]
pub use pool::THREAD_PREFIX;
pub use quantize::{encode_4bit, quantize_4bit};
pub use quantize_int8::quantize_int8;
pub use quantize_int8_rows::quantize_int8_rows;
pub use scales::Scales;
pub use search::search_scales;
pub use simd::{available, Bodies, Engine};
pub use values::{NonFinite, Stores, Values, ValuesMut};
