//! Which body runs: one table of functions per instruction set, chosen once at run time.

#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
mod arm;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

use std::ops::Range;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use arm::available as native;
#[cfg(target_arch = "x86_64")]
use x86::available as native;

use half::bf16;

use crate::codebook::Codebook;
use crate::double_quant::search::Search as ScaleSearch;
use crate::error::CodecError;
use crate::linear::dense::terms::{Pair, Products};
use crate::linear::matvec::{self, Matvec, PairsMatvec};
use crate::linear::{dense, Adapter, Epilogue, TileInput, Weight};
use crate::quantize_int8_rows;
use crate::scales::Scales;
use crate::search::{self, Way};
use crate::values::{Stores, Values, ValuesMut};
use crate::{dequantize, dequantize_int8, double_quant, quantize, quantize_int8};

/// Names the body to use, for tests and bug reports.
const VARIABLE: &str = "QKERN_SIMD";

/// Every name that a body has, on any machine, best first.
const KNOWN: [&str; 6] = ["amx", "avx512_bf16", "avx512", "avx2", "neon", "scalar"];

/// The operations of one instruction set. All take whole blocks only, `quantize_int8_row` one row
/// of any length.
#[derive(Debug)]
pub struct Bodies {
    name: &'static str,
    pub(crate) quantize_4bit: QuantizeFn,
    pub(crate) encode_4bit: EncodeFn,
    pub(crate) search_scales: SearchFn,
    pub(crate) dequantize_4bit: DequantizeFn,
    pub(crate) quantize_int8: QuantizeInt8Fn,
    pub(crate) dequantize_int8: DequantizeInt8Fn,
    pub(crate) quantize_int8_row: QuantizeInt8RowFn,
    pub(crate) floats: Products<f32>,
    pub(crate) pairs: Option<Products<Pair>>,
    pub(crate) decode_pairs: Option<&'static DecodePairs>,
    pub(crate) int8: Option<Int8Fn>,
    pub(crate) round: RoundFn,
    pub(crate) matvec: &'static Matvec,
    pub(crate) matvec_pairs: Option<&'static PairsMatvec>,
    pub(crate) tiles: Option<&'static Tiles>,
    pub(crate) transpose: fn(&mut [[f32; 16]; 16]),
    pub(crate) widen: WidenFn,
    pub(crate) quantize_scales: QuantizeScalesFn,
    pub(crate) write_scales: WriteScalesFn,
}

/// Products with instructions for tiles of matrices, for two tokens or more.
#[derive(Debug)]
pub(crate) struct Tiles {
    /// As [`crate::linear()`], arguments checked.
    pub(crate) forward: TileForwardFn,
    /// As [`crate::linear_backward`], arguments checked, for `Weight::chunks_have_scales`.
    pub(crate) backward: TileBackwardFn,
    /// `scaling * x w`: x, w, rank, scaling.
    pub(crate) thin: TileThinFn,
    /// `g^T x`: x, g, rank, features -> by strips of columns, and their width.
    pub(crate) gradient: TileGradientFn,
}

/// Pieces of weights for which [`Weight::chunks_have_scales`], by blocks of 64 columns, as pairs of
/// bfloat16; subnormal values may become zero.
#[derive(Debug)]
pub(crate) struct DecodePairs {
    /// As (rows, pairs of columns).
    pub(crate) along: DecodePairsFn,
    /// As (pairs of rows, columns).
    pub(crate) down: DecodePairsFn,
}

/// Weight, rows, columns -> pairs.
type DecodePairsFn = fn(&Weight<'_>, Range<usize>, Range<usize>, &mut [Pair]);
/// x, w, rank, scaling -> (tokens, rank).
type TileThinFn = fn(Engine, &[bf16], &[f32], usize, f32) -> Result<Vec<f32>, CodecError>;
/// x, g, rank, features -> (rank, columns) by strips, and their width.
type TileGradientFn =
    fn(Engine, &[bf16], &[f32], usize, usize) -> Result<(Vec<f32>, usize), CodecError>;
/// x, weight, what is added -> y.
type TileForwardFn =
    fn(Engine, TileInput<'_>, &Weight<'_>, &Epilogue<'_>, ValuesMut<'_>) -> Result<(), CodecError>;
/// x to be rounded to 8 bits, as the weight will be, what is added -> y.
type Int8Fn =
    fn(Engine, Values<'_>, &Weight<'_>, &Epilogue<'_>, ValuesMut<'_>) -> Result<(), CodecError>;
/// dY, weight, adapter -> dX.
type TileBackwardFn =
    fn(Engine, &[bf16], &Weight<'_>, Option<Adapter<'_>>, ValuesMut<'_>) -> Result<(), CodecError>;
/// Values, codes, block size -> packed, absmax, and whether all values were finite.
type QuantizeFn = fn(Values<'_>, &Codebook, usize, &mut [u8], &mut [f32]) -> bool;
/// Values, codes, block size, scales -> packed.
type EncodeFn = fn(Values<'_>, &Codebook, usize, &[f32], &mut [u8]);
/// Values, codes, block size, way -> scales, and whether all values were finite.
type SearchFn = fn(Values<'_>, &Codebook, usize, Way<'_>, &mut [f32]) -> bool;
/// Packed, absmax, table, block size, how to write -> values.
type DequantizeFn = fn(&[u8], &[f32], &[f32; 16], usize, Stores, ValuesMut<'_>);
/// Values, block size, how to write codes -> these, absmax, and whether all values were finite.
type QuantizeInt8Fn = fn(Values<'_>, usize, Stores, &mut [i8], &mut [f32]) -> bool;
/// Codes, absmax, block size, how to write -> values.
type DequantizeInt8Fn = fn(&[i8], &[f32], usize, Stores, ValuesMut<'_>);
/// Values of a row -> codes, and its absmax.
type QuantizeInt8RowFn = fn(Values<'_>, &mut [i8]) -> f32;
/// Values -> the same as floats.
type WidenFn = fn(Values<'_>, &mut [f32]);
/// Floats -> as many values of a dtype.
type RoundFn = fn(&[f32], ValuesMut<'_>);
/// Whole groups of scales, offset, table -> codes, second-level scales, and whether all survive.
type QuantizeScalesFn = fn(&[f32], f32, &ScaleSearch, &mut [u8], &mut [f32]) -> bool;
/// Scales, the block of the first that is wanted -> those from it on.
type WriteScalesFn = fn(&Scales<'_>, usize, &mut [f32]);

impl Bodies {
    /// `"amx"`, `"avx512_bf16"`, `"avx512"`, `"avx2"`, `"neon"` or `"scalar"`.
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

/// Who does the work: a set of bodies and a number of threads; and who may end it early.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    /// The instruction set.
    pub bodies: &'static Bodies,
    /// Threads to use, the calling one included; 0 for one per core.
    pub threads: usize,
    /// Asked now and then on the calling thread during long work: true ends it with
    /// [`CodecError::Interrupted`].
    pub interrupted: fn() -> bool,
}

impl Engine {
    /// These bodies on so many threads, never interrupted.
    pub fn new(bodies: &'static Bodies, threads: usize) -> Self {
        Self { bodies, threads, interrupted: || false }
    }

    /// The best bodies (see [`Bodies::detect`]) on all cores.
    ///
    /// # Errors
    /// If `QKERN_SIMD` names bodies that do not exist or that this machine cannot run.
    pub fn detect() -> Result<Self, CodecError> {
        Ok(Self::new(Bodies::detect()?, 0))
    }
}

/// The bodies that this machine can run, best first; the last is `scalar`.
pub fn available() -> &'static [&'static Bodies] {
    static AVAILABLE: OnceLock<Vec<&'static Bodies>> = OnceLock::new();
    AVAILABLE.get_or_init(|| native().chain([&SCALAR]).collect())
}

/// No instruction set of this architecture has bodies.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn native() -> impl Iterator<Item = &'static Bodies> {
    std::iter::empty()
}

static SCALAR: Bodies = SCALAR_BODIES;

const SCALAR_BODIES: Bodies = Bodies {
    name: "scalar",
    quantize_4bit: quantize::scalar::quantize,
    encode_4bit: quantize::scalar::encode,
    search_scales: search::scalar::search,
    dequantize_4bit: dequantize::scalar::dequantize,
    quantize_int8: quantize_int8::scalar::quantize,
    dequantize_int8: dequantize_int8::scalar::dequantize,
    quantize_int8_row: quantize_int8_rows::scalar::quantize,
    floats: Products { nt: dense::scalar::nt, nn: dense::scalar::nn },
    pairs: None,
    decode_pairs: None,
    int8: None,
    round: dense::scalar::round,
    matvec: &matvec::scalar::MATVEC,
    matvec_pairs: None,
    tiles: None,
    transpose: dense::scalar::transpose,
    widen: dense::scalar::widen,
    quantize_scales: double_quant::scalar::quantize,
    write_scales: |s, f, o| s.write(f, o),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_the_scalar_bodies_last() {
        let names: Vec<_> = available().iter().map(|bodies| bodies.name()).collect();
        assert_eq!(names.last(), Some(&"scalar"));
        let order: Vec<_> = KNOWN.into_iter().filter(|name| names.contains(name)).collect();
        assert_eq!(names, order, "best first, each once");
    }

    #[test]
    fn available_bodies_are_found_by_name() {
        for bodies in available() {
            assert_eq!(Bodies::named(bodies.name(), VARIABLE).unwrap().name(), bodies.name());
        }
    }

    #[test]
    fn other_names_are_refused_with_the_choice_there_is() {
        let error = Bodies::named("sse2", VARIABLE).unwrap_err().to_string();
        assert!(error.starts_with("QKERN_SIMD names the SIMD body \"sse2\""), "{error}");
        assert!(
            error.ends_with("allowed are amx, avx512_bf16, avx512, avx2, neon, scalar"),
            "{error}"
        );
        for name in KNOWN {
            if !available().iter().any(|bodies| bodies.name() == name) {
                let error = Bodies::named(name, VARIABLE).unwrap_err().to_string();
                assert!(error.contains("cannot run") && error.contains("scalar"), "{error}");
            }
        }
    }
}
