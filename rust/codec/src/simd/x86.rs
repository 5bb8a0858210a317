//! The bodies of x86-64: AVX2, AVX-512, this with products of bfloat16, and with the tiles of AMX.

use std::arch::is_x86_feature_detected as has;

use super::{Bodies, DecodePairs, Tiles};
use crate::linear::dense::avx512::lanes::{Floats, Pairs};
use crate::linear::dense::terms::Products;
use crate::linear::matvec::{self, Matvec, PairsMatvec};
use crate::linear::{amx, dense, TileInput};

use crate::values::with_slice;
use crate::{
    dequantize, dequantize_int8, double_quant, quantize, quantize_int8, quantize_int8_rows, search,
};

/// The only way to the tables below, which is what makes their calls sound.
pub(super) fn available() -> impl Iterator<Item = &'static Bodies> {
    let avx2 = has!("avx2") && has!("f16c") && has!("fma");
    let avx512 = avx2
        && has!("avx512f")
        && has!("avx512bw")
        && has!("avx512dq")
        && has!("avx512vl")
        && has!("avx512vbmi")
        && has!("avx512vnni");
    let pairs = avx512 && has!("avx512bf16");
    let amx = avx512 && amx::granted();
    let all = [(amx, &AMX), (pairs, &AVX512_BF16), (avx512, &AVX512), (avx2, &AVX2)];
    all.into_iter().filter_map(|(has, bodies)| has.then_some(bodies))
}

static AMX: Bodies = Bodies {
    name: "amx",
    // One token, all that tiles leave, has been measured there by `exact` alone.
    matvec_pairs: None,
    tiles: Some(&Tiles {
        forward: |e, x, w, l, y| match x {
            TileInput::Bf16(x) => {
                // SAFETY: handed out by `available` only, where the tiles were granted.
                with_slice!(y, ValuesMut, y => unsafe { amx::forward(e, x, w, l, y) })
            }
            TileInput::Int8(x) => {
                // SAFETY: as above.
                with_slice!(y, ValuesMut, y => unsafe { amx::forward_int8(e, x, w, l, y) })
            }
        },
        backward: |e, g, w, l, x| {
            // SAFETY: as above.
            with_slice!(x, ValuesMut, x => unsafe { amx::backward(e, g, w, l, x) })
        },
        // SAFETY: as above.
        thin: |e, x, w, r, s| unsafe { amx::thin(e, x, w, r, s) },
        // SAFETY: as above.
        gradient: |e, x, g, r, f| unsafe { amx::gradient(e, x, g, r, f) },
    }),
    ..AVX512_BF16_BODIES
};

static AVX512_BF16: Bodies = AVX512_BF16_BODIES;

const AVX512_BF16_BODIES: Bodies = Bodies {
    name: "avx512_bf16",
    pairs: Some(Products {
        // SAFETY: handed out by `available` only, where the instruction was found.
        nt: |x, w, k, s| unsafe { dense::avx512::nt::<Pairs>(x, w, k, s) },
        // SAFETY: as above.
        nn: |x, w, n, s, next| unsafe { dense::avx512::nn::<Pairs>(x, w, n, s, next) },
    }),
    decode_pairs: Some(&DecodePairs {
        // SAFETY: as above; `available` found all features.
        along: |w, r, c, p| unsafe { dense::avx512::decode::along(w, r, c, p) },
        // SAFETY: as above.
        down: |w, r, c, p| unsafe { dense::avx512::decode::down(w, r, c, p) },
    }),
    matvec_pairs: Some(&PairsMatvec {
        max_tokens: matvec::pairs_avx512::MAX_TOKENS,
        arrange: matvec::pairs_avx512::arrange,
        // SAFETY: as above.
        multiply: |w, r, x, s| unsafe { matvec::pairs_avx512::multiply(w, r, x, s) },
    }),
    ..AVX512_BODIES
};

static AVX512: Bodies = AVX512_BODIES;

const AVX512_BODIES: Bodies = Bodies {
    name: "avx512",
    // SAFETY: handed out by `available` only, where the features were found.
    quantize_4bit: |v, c, b, p, a| unsafe { quantize::avx512::quantize(v, c, b, p, a) },
    // SAFETY: as above.
    encode_4bit: |v, c, b, s, p| unsafe { quantize::avx512::encode(v, c, b, s, p) },
    // SAFETY: as above.
    search_scales: |v, c, b, w, s| unsafe { search::avx512::search(v, c, b, w, s) },
    // SAFETY: as above.
    dequantize_4bit: |p, a, t, b, s, v| unsafe {
        dequantize::avx512::dequantize(p, a, t, b, s, v);
    },
    // SAFETY: as above.
    quantize_int8: |v, b, s, q, a| unsafe { quantize_int8::avx512::quantize(v, b, s, q, a) },
    // SAFETY: as above.
    dequantize_int8: |q, a, b, s, v| unsafe {
        dequantize_int8::avx512::dequantize(q, a, b, s, v);
    },
    // SAFETY: as above.
    quantize_int8_row: |v, q| unsafe { quantize_int8_rows::avx512::quantize(v, q) },
    // SAFETY: as above.
    quantize_scales: |a, o, s, c, n| unsafe { double_quant::avx512::quantize(a, o, s, c, n) },
    // SAFETY: as above.
    write_scales: |s, f, o| unsafe { matvec::scales_avx512::write_scales(s, f, o) },
    floats: Products {
        // SAFETY: as above.
        nt: |x, w, k, s| unsafe { dense::avx512::nt::<Floats>(x, w, k, s) },
        // SAFETY: as above.
        nn: |x, w, n, s, next| unsafe { dense::avx512::nn::<Floats>(x, w, n, s, next) },
    },
    pairs: None,
    decode_pairs: None,
    int8: Some(|e, x, w, l, y| {
        // SAFETY: as above.
        with_slice!(y, ValuesMut, y => unsafe { dense::avx512::int8::forward(e, x, w, l, y) })
    }),
    // SAFETY: as above.
    transpose: |s| unsafe { dense::convert_avx512::transpose(s) },
    // SAFETY: as above.
    widen: |v, f| unsafe { dense::convert_avx512::widen(v, f) },
    // SAFETY: as above.
    round: |f, v| unsafe { dense::convert_avx512::round(f, v) },
    matvec: &Matvec {
        arrange: matvec::avx512::arrange,
        // SAFETY: as above.
        exact: |w, r, x, s| unsafe { matvec::avx512::exact(w, r, x, s) },
        // SAFETY: as above.
        int8: |w, r, x, s| unsafe { matvec::int8::avx512::multiply(w, r, x, s) },
    },
    matvec_pairs: None,
    tiles: None,
};

static AVX2: Bodies = Bodies {
    name: "avx2",
    // SAFETY: handed out by `available` only, where the features were found.
    quantize_4bit: |v, c, b, p, a| unsafe { quantize::avx2::quantize(v, c, b, p, a) },
    // SAFETY: as above.
    encode_4bit: |v, c, b, s, p| unsafe { quantize::avx2::encode(v, c, b, s, p) },
    // SAFETY: as above.
    search_scales: |v, c, b, w, s| unsafe { search::avx2::search(v, c, b, w, s) },
    // SAFETY: as above.
    dequantize_4bit: |p, a, t, b, s, v| unsafe { dequantize::avx2::dequantize(p, a, t, b, s, v) },
    // SAFETY: as above.
    quantize_int8: |v, b, s, q, a| unsafe { quantize_int8::avx2::quantize(v, b, s, q, a) },
    // SAFETY: as above.
    dequantize_int8: |q, a, b, s, v| unsafe {
        dequantize_int8::avx2::dequantize(q, a, b, s, v);
    },
    // SAFETY: as above.
    quantize_int8_row: |v, q| unsafe { quantize_int8_rows::avx2::quantize(v, q) },
    // SAFETY: as above.
    quantize_scales: |a, o, s, c, n| unsafe { double_quant::avx2::quantize(a, o, s, c, n) },
    write_scales: |s, f, o| s.write(f, o),
    floats: Products {
        // SAFETY: as above.
        nt: |x, w, k, s| unsafe { dense::avx2::nt(x, w, k, s) },
        // SAFETY: as above.
        nn: |x, w, n, s, next| unsafe { dense::avx2::nn(x, w, n, s, next) },
    },
    pairs: None,
    decode_pairs: None,
    int8: None,
    transpose: dense::scalar::transpose,
    // SAFETY: as above.
    widen: |v, f| unsafe { dense::convert_avx2::widen(v, f) },
    round: dense::scalar::round,
    matvec: &Matvec {
        arrange: matvec::avx2::arrange,
        // SAFETY: as above.
        exact: |w, r, x, s| unsafe { matvec::avx2::exact(w, r, x, s) },
        int8: |w, r, x, s| {
            if has!("avxvnni") {
                // SAFETY: as above, and the last feature was found.
                unsafe { matvec::int8::avx2::multiply_vnni(w, r, x, s) }
            } else {
                // SAFETY: as above.
                unsafe { matvec::int8::avx2::multiply(w, r, x, s) }
            }
        },
    },
    matvec_pairs: None,
    tiles: None,
};
