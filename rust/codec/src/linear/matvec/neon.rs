//! NEON: the four bytes of a float are looked up one by one and put together, 16 codes at a time.
//!
//! ```text
//! piece      16 bytes = 32 codes: the smallest block
//! lookup     `tbl` in four tables: byte b of the value of each code
//! floats     zips of bytes, then of halves: those of the high nibbles in order, then those of the
//!            low ones. x has the values at even places of a piece first, then those at odd places
//! ```

use std::arch::aarch64::*;
use std::borrow::Cow;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::linear::matvec::by_token;
use crate::linear::weight::{Codes, Weight};
use crate::neon::{load, load_f32, nibbles, prefetch, widen_i8, Planes};

/// Codes that are multiplied together.
pub(crate) const PIECE: usize = 32;
/// The same of 8 bits.
const PIECE_INT8: usize = 16;
/// How far ahead bytes are fetched.
pub(crate) const AHEAD: usize = 2048;
/// Scales that are decoded together.
const SCALES: usize = 64;

/// The tokens in the order of [`exact`].
pub(crate) fn arrange<'a>(x: &'a [f32], weight: &Weight<'_>) -> Cow<'a, [f32]> {
    if matches!(weight.codes, Codes::Int8(_)) {
        return Cow::Borrowed(x);
    }
    let mut ordered = vec![0.0; x.len()]; // whole pieces, as blocks are
    for (x, piece) in x.as_chunks::<PIECE>().0.iter().zip(ordered.as_chunks_mut::<PIECE>().0) {
        let (evens, odds) = piece.split_at_mut(PIECE / 2);
        for ((pair, even), odd) in x.as_chunks().0.iter().zip(evens).zip(odds) {
            [*even, *odd] = *pair;
        }
    }
    Cow::Owned(ordered)
}

/// Writes the sums of some rows.
#[target_feature(enable = "neon")]
pub(crate) fn exact(weight: &Weight<'_>, rows: Range<usize>, x: &[f32], sums: &mut [f32]) {
    match sums.len() / rows.len() {
        1 => exact_tokens::<1>(weight, rows, x, sums),
        2 => exact_tokens::<2>(weight, rows, x, sums),
        3 => exact_tokens::<3>(weight, rows, x, sums),
        _ => exact_tokens::<4>(weight, rows, x, sums),
    }
}

/// Writes the sums of M tokens.
#[target_feature(enable = "neon")]
fn exact_tokens<const M: usize>(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &[f32],
    sums: &mut [f32],
) {
    let (cols, count) = (weight.cols, rows.len());
    let x: [&[f32]; M] = by_token(x);
    match weight.codes {
        Codes::FourBit { packed, table } => {
            let planes = Planes::new(core::array::from_fn(|i| load_f32(&table.as_chunks().0[i])));
            for (i, row) in rows.enumerate() {
                let codes = &packed[row * cols / 2..(row + 1) * cols / 2];
                let found = by_blocks(weight, row, 1.0, |block| {
                    let codes = &codes[block.start / 2..block.end / 2];
                    products(codes, planes, x.map(|x| &x[block.clone()]))
                });
                put(found, count, &mut sums[i..]);
            }
        }
        Codes::Int8(codes) => {
            for (i, row) in rows.enumerate() {
                let codes = &codes[row * cols..(row + 1) * cols];
                let found = by_blocks(weight, row, STEP, |block| {
                    int8_products(&codes[block.clone()], x.map(|x| &x[block.clone()]))
                });
                put(found, count, &mut sums[i..]);
            }
        }
    }
}

/// Writes the sum of each token, `count` places apart.
#[inline]
#[target_feature(enable = "neon")]
fn put<const M: usize>(found: [float32x4_t; M], count: usize, sums: &mut [f32]) {
    for (found, sum) in found.into_iter().zip(sums.iter_mut().step_by(count)) {
        *sum = vaddvq_f32(found);
    }
}

/// The sums of a row, given the products of a block: these times its scale and `factor`.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn by_blocks<const M: usize>(
    weight: &Weight<'_>,
    row: usize,
    factor: f32,
    products: impl Fn(Range<usize>) -> [float32x4_t; M],
) -> [float32x4_t; M] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let mut sums = [vdupq_n_f32(0.0); M];
    let mut room = [0.0; SCALES];
    for first in (0..blocks).step_by(SCALES) {
        let scales = &mut room[..(blocks - first).min(SCALES)];
        weight.scales.write(row * blocks + first, scales);
        for (block, scale) in (first..).zip(scales) {
            let found = products(block * blocksize..(block + 1) * blocksize);
            for (sum, found) in sums.iter_mut().zip(found) {
                *sum = vfmaq_n_f32(*sum, found, *scale * factor);
            }
        }
    }
    sums
}

/// The products of a block of 4-bit codes with M of x.
#[inline]
#[target_feature(enable = "neon")]
fn products<const M: usize>(codes: &[u8], planes: Planes, x: [&[f32]; M]) -> [float32x4_t; M] {
    // Two sums each: an addition need not wait for the one before it.
    let mut products = [[vdupq_n_f32(0.0); M]; 2];
    let x = x.map(|x| x.as_chunks::<4>().0.as_chunks::<4>().0.as_chunks::<2>().0);
    for (i, piece) in codes.as_chunks::<{ PIECE / 2 }>().0.iter().enumerate() {
        if i % 4 == 0 {
            prefetch(piece, AHEAD); // once a cache line
        }
        for (half, codes) in nibbles(load(piece)).into_iter().enumerate() {
            for (v, values) in planes.floats(codes).into_iter().enumerate() {
                for (x, product) in x.iter().zip(&mut products[half]) {
                    *product = vfmaq_f32(*product, values, load_f32(&x[i][half][v]));
                }
            }
        }
    }
    core::array::from_fn(|m| vaddq_f32(products[0][m], products[1][m]))
}

/// The products of a block of 8-bit codes with M of x.
#[inline]
#[target_feature(enable = "neon")]
fn int8_products<const M: usize>(codes: &[i8], x: [&[f32]; M]) -> [float32x4_t; M] {
    let mut products = [[vdupq_n_f32(0.0); M]; 2];
    let (pieces, rest) = codes.as_chunks::<PIECE_INT8>();
    let whole = x.map(|x| x.as_chunks::<PIECE_INT8>().0);
    for (i, piece) in pieces.iter().enumerate() {
        if i % 4 == 0 {
            prefetch(piece, AHEAD);
        }
        add_int8(&mut products, piece, whole.map(|x| &x[i]));
    }
    if !rest.is_empty() {
        let filled = |x: &[f32]| core::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0));
        let codes = core::array::from_fn(|i| rest.get(i).copied().unwrap_or(0));
        let x: [[f32; PIECE_INT8]; M] = x.map(|x| filled(x.as_chunks::<PIECE_INT8>().1));
        add_int8(&mut products, &codes, x.each_ref());
    }
    core::array::from_fn(|m| vaddq_f32(products[0][m], products[1][m]))
}

/// Adds the products of a piece of 8-bit codes.
#[inline]
#[target_feature(enable = "neon")]
fn add_int8<const M: usize>(
    products: &mut [[float32x4_t; M]; 2],
    codes: &[i8; PIECE_INT8],
    x: [&[f32; PIECE_INT8]; M],
) {
    for (v, codes) in widen_i8(codes).into_iter().enumerate() {
        for (x, product) in x.iter().zip(&mut products[v % 2]) {
            *product = vfmaq_f32(*product, codes, load_f32(&x.as_chunks().0[v]));
        }
    }
}
