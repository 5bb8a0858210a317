//! Which body runs: one table of functions per instruction set, chosen once at run time.

use std::sync::OnceLock;

use crate::codebook::Codebook;
use crate::error::CodecError;
use crate::values::{Values, ValuesMut};
use crate::{dequantize, dequantize_int8, quantize, quantize_int8};

/// Names the body to use, for tests and bug reports.
const VARIABLE: &str = "QKERN_SIMD";

/// Every name that a body has, on any machine, best first.
const KNOWN: [&str; 3] = ["avx512", "avx2", "scalar"];

/// The operations of one instruction set. All take whole blocks only.
#[derive(Debug)]
pub struct Bodies {
    name: &'static str,
    pub(crate) quantize_4bit: QuantizeFn,
    pub(crate) dequantize_4bit: DequantizeFn,
    pub(crate) quantize_int8: QuantizeInt8Fn,
    pub(crate) dequantize_int8: DequantizeInt8Fn,
}

/// Values, codes, block size -> packed, absmax, and whether all values were finite.
type QuantizeFn = fn(Values<'_>, &Codebook, usize, &mut [u8], &mut [f32]) -> bool;
/// Packed, absmax, table, block size -> values.
type DequantizeFn = fn(&[u8], &[f32], &[f32; 16], usize, ValuesMut<'_>);
/// Values, block size -> codes, absmax, and whether all values were finite.
type QuantizeInt8Fn = fn(Values<'_>, usize, &mut [i8], &mut [f32]) -> bool;
/// Codes, absmax, block size -> values.
type DequantizeInt8Fn = fn(&[i8], &[f32], usize, ValuesMut<'_>);

impl Bodies {
    /// `"scalar"`, `"avx2"` or `"avx512"`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The bodies called `name`, which came from `origin` (said in the error).
    ///
    /// # Errors
    /// [`CodecError::UnknownSimd`] or [`CodecError::UnavailableSimd`].
    pub fn named(name: &str, origin: &'static str) -> Result<&'static Self, CodecError> {
        if let Some(bodies) = available().iter().find(|bodies| bodies.name == name) {
            return Ok(bodies);
        }
        let name = name.to_owned();
        if KNOWN.contains(&name.as_str()) {
            let names: Vec<_> = available().iter().map(|bodies| bodies.name).collect();
            Err(CodecError::UnavailableSimd { name, origin, available: names.join(", ") })
        } else {
            Err(CodecError::UnknownSimd { name, origin, known: KNOWN.join(", ") })
        }
    }

    /// The best bodies of this machine, or those that the environment variable `QKERN_SIMD` names.
    ///
    /// # Errors
    /// As [`Bodies::named`], for the variable.
    pub fn detect() -> Result<&'static Self, CodecError> {
        static CHOICE: OnceLock<Result<&'static Bodies, CodecError>> = OnceLock::new();
        CHOICE
            .get_or_init(|| match std::env::var_os(VARIABLE) {
                Some(name) if !name.is_empty() => Self::named(&name.to_string_lossy(), VARIABLE),
                _ => Ok(available()[0]),
            })
            .clone()
    }
}

/// Who does the work: a set of bodies and a number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// The instruction set.
    pub bodies: &'static Bodies,
    /// Threads to use, the calling one included; 0 for one per core.
    pub threads: usize,
}

impl Engine {
    /// The best bodies (see [`Bodies::detect`]) on all cores.
    ///
    /// # Errors
    /// If `QKERN_SIMD` names bodies that do not exist or that this machine cannot run.
    pub fn detect() -> Result<Self, CodecError> {
        Ok(Self { bodies: Bodies::detect()?, threads: 0 })
    }
}

/// The bodies that this machine can run, best first; the last is `scalar`.
pub fn available() -> &'static [&'static Bodies] {
    static AVAILABLE: OnceLock<Vec<&'static Bodies>> = OnceLock::new();
    AVAILABLE.get_or_init(|| vec![&SCALAR])
}

static SCALAR: Bodies = Bodies {
    name: "scalar",
    quantize_4bit: quantize::scalar::quantize,
    dequantize_4bit: dequantize::scalar::dequantize,
    quantize_int8: quantize_int8::scalar::quantize,
    dequantize_int8: dequantize_int8::scalar::dequantize,
};
