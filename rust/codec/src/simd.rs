//! Which body runs: one table of functions per instruction set, chosen once at run time.

use std::sync::OnceLock;

use crate::codebook::Codebook;
use crate::error::CodecError;
use crate::linear::dense;
use crate::search::{self, Importance};
use crate::values::{Values, ValuesMut};
use crate::{dequantize, dequantize_int8, quantize, quantize_int8, quantize_int8_rows};

/// Names the body to use, for tests and bug reports.
const VARIABLE: &str = "QKERN_SIMD";

/// Every name that a body has, on any machine, best first.
const KNOWN: [&str; 3] = ["avx512", "avx2", "scalar"];

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
    pub(crate) matmul_nt: MatmulFn,
    pub(crate) matmul_nn: MatmulAheadFn,
    pub(crate) transpose: fn(&mut [[f32; 16]; 16]),
    pub(crate) widen: WidenFn,
}

/// Values, codes, block size -> packed, absmax, and whether all values were finite.
type QuantizeFn = fn(Values<'_>, &Codebook, usize, &mut [u8], &mut [f32]) -> bool;
/// Values, codes, block size, scales -> packed.
type EncodeFn = fn(Values<'_>, &Codebook, usize, &[f32], &mut [u8]);
/// Values, codes, block size, importance -> scales, and whether all values were finite.
type SearchFn = fn(Values<'_>, &Codebook, usize, Option<Importance<'_>>, &mut [f32]) -> bool;
/// Packed, absmax, table, block size -> values.
type DequantizeFn = fn(&[u8], &[f32], &[f32; 16], usize, ValuesMut<'_>);
/// Values, block size -> codes, absmax, and whether all values were finite.
type QuantizeInt8Fn = fn(Values<'_>, usize, &mut [i8], &mut [f32]) -> bool;
/// Codes, absmax, block size -> values.
type DequantizeInt8Fn = fn(&[i8], &[f32], usize, ValuesMut<'_>);
/// Values of a row -> codes, and its absmax.
type QuantizeInt8RowFn = fn(Values<'_>, &mut [i8]) -> f32;
/// As [`MatmulFn`], and what will be needed next, to be fetched meanwhile.
type MatmulAheadFn = fn(&[f32], &[f32], usize, &mut [f32], &[f32]);
/// Values -> the same as floats.
type WidenFn = fn(Values<'_>, &mut [f32]);
/// Two matrices, columns of the second, the sums that their product is added to.
type MatmulFn = fn(&[f32], &[f32], usize, &mut [f32]);

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
#[cfg(not(target_arch = "x86_64"))]
fn native() -> impl Iterator<Item = &'static Bodies> {
    std::iter::empty()
}

static SCALAR: Bodies = Bodies {
    name: "scalar",
    quantize_4bit: quantize::scalar::quantize,
    encode_4bit: quantize::scalar::encode,
    search_scales: search::scalar::search,
    dequantize_4bit: dequantize::scalar::dequantize,
    quantize_int8: quantize_int8::scalar::quantize,
    dequantize_int8: dequantize_int8::scalar::dequantize,
    quantize_int8_row: quantize_int8_rows::scalar::quantize,
    matmul_nt: dense::scalar::nt,
    matmul_nn: dense::scalar::nn,
    transpose: dense::scalar::transpose,
    widen: dense::scalar::widen,
};

#[cfg(target_arch = "x86_64")]
use x86::available as native;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use super::{
        dense, dequantize, dequantize_int8, quantize, quantize_int8, quantize_int8_rows, search,
        Bodies,
    };
    use std::arch::is_x86_feature_detected as has;

    /// The only way to the tables below, which is what makes their calls sound.
    pub(super) fn available() -> impl Iterator<Item = &'static Bodies> {
        let avx2 = has!("avx2") && has!("f16c") && has!("fma");
        let avx512 = avx2
            && has!("avx512f")
            && has!("avx512bw")
            && has!("avx512dq")
            && has!("avx512vl")
            && has!("avx512vbmi");
        avx512.then_some(&AVX512).into_iter().chain(avx2.then_some(&AVX2))
    }

    static AVX512: Bodies = Bodies {
        name: "avx512",
        // SAFETY: handed out by `available` only, where the features were found.
        quantize_4bit: |v, c, b, p, a| unsafe { quantize::avx512::quantize(v, c, b, p, a) },
        // SAFETY: as above.
        encode_4bit: |v, c, b, s, p| unsafe { quantize::avx512::encode(v, c, b, s, p) },
        // SAFETY: as above.
        search_scales: |v, c, b, i, s| unsafe { search::avx512::search(v, c, b, i, s) },
        // SAFETY: as above.
        dequantize_4bit: |p, a, t, b, v| unsafe { dequantize::avx512::dequantize(p, a, t, b, v) },
        // SAFETY: as above.
        quantize_int8: |v, b, q, a| unsafe { quantize_int8::avx512::quantize(v, b, q, a) },
        // SAFETY: as above.
        dequantize_int8: |q, a, b, v| unsafe { dequantize_int8::avx512::dequantize(q, a, b, v) },
        // SAFETY: as above.
        quantize_int8_row: |v, q| unsafe { quantize_int8_rows::avx512::quantize(v, q) },
        // SAFETY: as above.
        matmul_nt: |x, w, k, s| unsafe { dense::avx512::nt(x, w, k, s) },
        // SAFETY: as above.
        matmul_nn: |x, w, n, s, next| unsafe { dense::avx512::nn(x, w, n, s, next) },
        // SAFETY: as above.
        transpose: |s| unsafe { dense::convert_avx512::transpose(s) },
        // SAFETY: as above.
        widen: |v, f| unsafe { dense::convert_avx512::widen(v, f) },
    };

    static AVX2: Bodies = Bodies {
        name: "avx2",
        // SAFETY: handed out by `available` only, where the features were found.
        quantize_4bit: |v, c, b, p, a| unsafe { quantize::avx2::quantize(v, c, b, p, a) },
        // SAFETY: as above.
        encode_4bit: |v, c, b, s, p| unsafe { quantize::avx2::encode(v, c, b, s, p) },
        // SAFETY: as above.
        search_scales: |v, c, b, i, s| unsafe { search::avx2::search(v, c, b, i, s) },
        // SAFETY: as above.
        dequantize_4bit: |p, a, t, b, v| unsafe { dequantize::avx2::dequantize(p, a, t, b, v) },
        // SAFETY: as above.
        quantize_int8: |v, b, q, a| unsafe { quantize_int8::avx2::quantize(v, b, q, a) },
        // SAFETY: as above.
        dequantize_int8: |q, a, b, v| unsafe { dequantize_int8::avx2::dequantize(q, a, b, v) },
        // SAFETY: as above.
        quantize_int8_row: |v, q| unsafe { quantize_int8_rows::avx2::quantize(v, q) },
        // SAFETY: as above.
        matmul_nt: |x, w, k, s| unsafe { dense::avx2::nt(x, w, k, s) },
        // SAFETY: as above.
        matmul_nn: |x, w, n, s, next| unsafe { dense::avx2::nn(x, w, n, s, next) },
        transpose: dense::scalar::transpose,
        // SAFETY: as above.
        widen: |v, f| unsafe { dense::convert_avx2::widen(v, f) },
    };
}

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
        assert!(error.ends_with("allowed are avx512, avx2, scalar"), "{error}");
        for name in KNOWN {
            if !available().iter().any(|bodies| bodies.name() == name) {
                let error = Bodies::named(name, VARIABLE).unwrap_err().to_string();
                assert!(error.contains("cannot run") && error.contains("scalar"), "{error}");
            }
        }
    }
}
