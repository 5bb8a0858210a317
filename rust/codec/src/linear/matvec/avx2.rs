//! AVX2: the four bytes of a float are looked up one by one and put together, 32 codes at a time.
//!
//! ```text
//! piece      32 bytes = 64 codes
//! lookup     `vpshufb` in four tables: byte b of the value of each code
//! floats     `vpunpck` of bytes, then of words: vector v has, in its lower half, the codes of bytes
//!            4 v to 4 v + 3, in its upper half those 16 further on: x is in that order
//! ```

use std::arch::x86_64::*;
use std::borrow::Cow;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::double_quant::NESTED_BLOCKSIZE;
use crate::linear::matvec::by_token;
use crate::linear::weight::{Codes, Weight};
use crate::scales::Scales;
use crate::x86::avx2::{lanes, load, load_eight, load_f32, load_quarter, lookup};
use crate::x86::prefetch;

/// Codes that are multiplied together.
pub(crate) const PIECE: usize = 64;
/// How far ahead bytes are fetched.
const AHEAD: usize = 2048;

/// The tokens in the order of [`exact`], each filled up with zeros to whole pieces.
pub(crate) fn arrange<'a>(x: &'a [f32], weight: &Weight<'_>) -> Cow<'a, [f32]> {
    if matches!(weight.codes, Codes::Int8(_)) {
        return Cow::Borrowed(x);
    }
    let padded = weight.cols.next_multiple_of(PIECE);
    let mut ordered = vec![0.0; x.len() / weight.cols * padded];
    for (x, ordered) in x.chunks_exact(weight.cols).zip(ordered.chunks_exact_mut(padded)) {
        for (x, piece) in x.chunks(PIECE).zip(ordered.as_chunks_mut::<PIECE>().0) {
            for (byte, [even, odd]) in x.as_chunks::<2>().0.iter().enumerate() {
                let place = byte % 16 / 4 * 8 + byte / 16 * 4 + byte % 4;
                piece[place] = *even;
                piece[PIECE / 2 + place] = *odd;
            }
        }
    }
    Cow::Owned(ordered)
}

/// Writes the sums of some rows.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn exact(weight: &Weight<'_>, rows: Range<usize>, x: &[f32], sums: &mut [f32]) {
    match sums.len() / rows.len() {
        1 => exact_tokens::<1>(weight, rows, x, sums),
        2 => exact_tokens::<2>(weight, rows, x, sums),
        3 => exact_tokens::<3>(weight, rows, x, sums),
        _ => exact_tokens::<4>(weight, rows, x, sums),
    }
}

/// Writes the sums of M tokens.
#[target_feature(enable = "avx2,fma")]
fn exact_tokens<const M: usize>(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &[f32],
    sums: &mut [f32],
) {
    let count = rows.len();
    match weight.codes {
        Codes::FourBit { packed, table } => {
            let x = x.as_chunks::<8>().0.as_chunks::<8>().0;
            let x: [&[[[f32; 8]; 8]]; M] = by_token(x);
            let planes = planes(table);
            for (i, row) in rows.enumerate() {
                let found = by_pieces(weight, packed, row, |piece, codes| {
                    products(codes, planes, x.map(|x| &x[piece]))
                });
                put(&found, count, &mut sums[i..]);
            }
        }
        Codes::Int8(codes) => {
            let x: [&[f32]; M] = by_token(x);
            for (i, row) in rows.enumerate() {
                put(&int8(weight, codes, row, x), count, &mut sums[i..]);
            }
        }
    }
}

/// Writes the sum of each token, `count` places apart.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn put<const M: usize>(found: &[__m256; M], count: usize, sums: &mut [f32]) {
    for (found, sum) in found.iter().zip(sums.iter_mut().step_by(count)) {
        let [a, b, c, d, e, f, g, h] = lanes(*found);
        *sum = ((a + e) + (b + f)) + ((c + g) + (d + h));
    }
}

/// The sums of a row of 4-bit codes, given the products of a piece: lanes 0 to 3 are of its first
/// half, the others of its second.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn by_pieces<const M: usize>(
    weight: &Weight<'_>,
    packed: &[u8],
    row: usize,
    products: impl Fn(usize, __m256i) -> [__m256; M],
) -> [__m256; M] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let bytes = &packed[row * cols / 2..(row + 1) * cols / 2];
    let (pieces, rest) = bytes.as_chunks::<{ PIECE / 2 }>();
    let mut sums = [_mm256_setzero_ps(); M];
    let mut add = |piece: usize, codes: &[u8; PIECE / 2], scales: __m256| {
        prefetch(codes, AHEAD);
        for (product, sum) in products(piece, load(codes)).into_iter().zip(&mut sums) {
            *sum = _mm256_fmadd_ps(product, scales, *sum);
        }
    };
    for first in (0..blocks).step_by(8) {
        let scales = load_scales(&weight.scales, row * blocks + first, (blocks - first).min(8));
        let scales = lanes(scales);
        if blocksize < PIECE {
            // Two scales a piece; the last may be half a one: x and its second scale are zero.
            for (piece, [near, far]) in (first / 2..).zip(scales.as_chunks().0) {
                let scales = _mm256_blend_ps::<0xf0>(_mm256_set1_ps(*near), _mm256_set1_ps(*far));
                match pieces.get(piece) {
                    Some(codes) => add(piece, codes, scales),
                    None if piece == pieces.len() && !rest.is_empty() => {
                        let codes = core::array::from_fn(|i| rest.get(i).copied().unwrap_or(0));
                        add(piece, &codes, scales);
                    }
                    None => break,
                }
            }
        } else {
            let a_block = blocksize / PIECE;
            for (block, scale) in (first..blocks).zip(scales) {
                let place = block * a_block;
                for (piece, codes) in (place..).zip(&pieces[place..place + a_block]) {
                    add(piece, codes, _mm256_set1_ps(scale));
                }
            }
        }
    }
    sums
}

/// Byte `b` of each value of a table, in both halves of vector `b`.
#[inline]
#[target_feature(enable = "avx2")]
fn planes(table: &[f32; 16]) -> [__m256i; 4] {
    let bytes = table.map(|value| value.to_bits().to_le_bytes());
    core::array::from_fn(|b| load::<u8, 32>(&core::array::from_fn(|i| bytes[i % 16][b])))
}

/// The products of a piece of codes with M of x.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn products<const M: usize>(
    codes: __m256i,
    planes: [__m256i; 4],
    x: [&[[f32; 8]; 8]; M],
) -> [__m256; M] {
    let low = _mm256_set1_epi8(15);
    let nibbles =
        [_mm256_and_si256(_mm256_srli_epi16::<4>(codes), low), _mm256_and_si256(codes, low)];
    let mut products = [_mm256_setzero_ps(); M];
    for (half, nibbles) in nibbles.into_iter().enumerate() {
        for (v, values) in floats(nibbles, planes).into_iter().enumerate() {
            for (x, product) in x.iter().zip(&mut products) {
                let x = load_f32(&x[4 * half + v]);
                *product = _mm256_fmadd_ps(_mm256_castsi256_ps(values), x, *product);
            }
        }
    }
    products
}

/// The floats of 32 codes.
#[inline]
#[target_feature(enable = "avx2")]
fn floats(codes: __m256i, planes: [__m256i; 4]) -> [__m256i; 4] {
    let [a, b, c, d] = planes.map(|plane| _mm256_shuffle_epi8(plane, codes));
    let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d));
    let (low2, high2) = (_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d));
    [
        _mm256_unpacklo_epi16(low, high),
        _mm256_unpackhi_epi16(low, high),
        _mm256_unpacklo_epi16(low2, high2),
        _mm256_unpackhi_epi16(low2, high2),
    ]
}

/// The sums of a row of 8-bit codes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn int8<const M: usize>(
    weight: &Weight<'_>,
    codes: &[i8],
    row: usize,
    x: [&[f32]; M],
) -> [__m256; M] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let mut sums = [_mm256_setzero_ps(); M];
    for first in (0..blocks).step_by(8) {
        let scales = load_scales(&weight.scales, row * blocks + first, (blocks - first).min(8));
        let scales = lanes(_mm256_mul_ps(scales, _mm256_set1_ps(STEP)));
        for (block, scale) in (first..blocks).zip(scales) {
            let place = block * blocksize;
            let codes = &codes[row * cols + place..][..blocksize];
            let products = int8_products(codes, x.map(|x| &x[place..][..blocksize]));
            for (product, sum) in products.into_iter().zip(&mut sums) {
                *sum = _mm256_fmadd_ps(product, _mm256_set1_ps(scale), *sum);
            }
        }
    }
    sums
}

/// The products of a block of 8-bit codes with M of x.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn int8_products<const M: usize>(codes: &[i8], x: [&[f32]; M]) -> [__m256; M] {
    // Two sums each: an addition need not wait for the one before it.
    let mut products = [[_mm256_setzero_ps(); M]; 2];
    let (pieces, rest) = codes.as_chunks::<PIECE>();
    let x_of = x.map(|x| x.as_chunks::<8>().0.as_chunks::<8>().0);
    for (i, piece) in pieces.iter().enumerate() {
        prefetch(piece, AHEAD);
        let x = x_of.map(|x| &x[i]);
        for (j, eight) in piece.as_chunks::<8>().0.iter().enumerate() {
            let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_quarter(eight)));
            for (x, product) in x.iter().zip(&mut products[j % 2]) {
                *product = _mm256_fmadd_ps(codes, load_f32(&x[j]), *product);
            }
        }
    }
    for (i, codes) in rest.chunks(8).enumerate() {
        let place = pieces.len() * PIECE + 8 * i;
        let codes: [f32; 8] =
            core::array::from_fn(|i| codes.get(i).map_or(0.0, |&code| f32::from(code)));
        for (x, product) in x.iter().zip(&mut products[0]) {
            let x: [f32; 8] = core::array::from_fn(|i| x.get(place + i).copied().unwrap_or(0.0));
            *product = _mm256_fmadd_ps(load_f32(&codes), load_f32(&x), *product);
        }
    }
    core::array::from_fn(|m| _mm256_add_ps(products[0][m], products[1][m]))
}

/// Up to 8 scales from that of block `first` on; the lanes behind them are zero.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn load_scales(scales: &Scales<'_>, first: usize, count: usize) -> __m256 {
    match *scales {
        Scales::Plain(scales) if count == 8 => {
            load_f32(scales[first..].first_chunk().expect("8 scales"))
        }
        Scales::Nested { codes, table, nested, offset }
            if count == 8 && first % NESTED_BLOCKSIZE <= NESTED_BLOCKSIZE - 8 =>
        {
            let codes = load_eight(codes[first..].first_chunk().expect("8 scales"));
            let values = lookup(table, codes);
            // Two roundings, as everywhere.
            let nested = _mm256_set1_ps(nested[first / NESTED_BLOCKSIZE]);
            _mm256_add_ps(_mm256_mul_ps(values, nested), _mm256_set1_ps(offset))
        }
        _ => {
            let mut room = [0.0; 8];
            scales.write(first, &mut room[..count]);
            load_f32(&room)
        }
    }
}
