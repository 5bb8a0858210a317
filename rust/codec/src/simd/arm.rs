//! The bodies of 64-bit ARM: NEON.

use std::arch::is_aarch64_feature_detected as has;

use super::{Bodies, SCALAR_BODIES};
use crate::linear::matvec::{self, Matvec};
use crate::{dequantize, dequantize_int8, quantize, quantize_int8, quantize_int8_rows, search};

/// The only way to the table below, which is what makes its calls sound.
pub(super) fn available() -> impl Iterator<Item = &'static Bodies> {
    // Bytes are taken for parts of numbers.
    let neon = has!("neon") && cfg!(target_endian = "little");
    neon.then_some(&NEON).into_iter()
}

static NEON: Bodies = Bodies {
    name: "neon",
    // SAFETY: handed out by `available` only, where the feature was found.
    quantize_4bit: |v, c, b, p, a| unsafe { quantize::neon::quantize(v, c, b, p, a) },
    // SAFETY: as above.
    encode_4bit: |v, c, b, s, p| unsafe { quantize::neon::encode(v, c, b, s, p) },
    // SAFETY: as above.
    search_scales: |v, c, b, w, s| unsafe { search::neon::search(v, c, b, w, s) },
    // SAFETY: as above.
    dequantize_4bit: |p, a, t, b, _, v| unsafe { dequantize::neon::dequantize(p, a, t, b, v) },
    // SAFETY: as above.
    quantize_int8: |v, b, _, q, a| unsafe { quantize_int8::neon::quantize(v, b, q, a) },
    // SAFETY: as above.
    dequantize_int8: |q, a, b, _, v| unsafe { dequantize_int8::neon::dequantize(q, a, b, v) },
    // SAFETY: as above.
    quantize_int8_row: |v, q| unsafe { quantize_int8_rows::neon::quantize(v, q) },
    matvec: &Matvec {
        arrange: matvec::neon::arrange,
        // SAFETY: as above.
        exact: |w, r, x, s| unsafe { matvec::neon::exact(w, r, x, s) },
        int8: |w, r, x, s| {
            if has!("dotprod") {
                // SAFETY: as above, and the last feature was found.
                unsafe { matvec::int8::neon::multiply_dotprod(w, r, x, s) }
            } else {
                // SAFETY: as above.
                unsafe { matvec::int8::neon::multiply(w, r, x, s) }
            }
        },
    },
    ..SCALAR_BODIES
};
