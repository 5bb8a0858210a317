//! AVX2: `vpmaddubsw` and `vpmaddwd`, or `vpdpbusd` where the machine has AVX-VNNI.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::linear::matvec::avx2::{by_pieces, load_scales, put};
use crate::linear::matvec::int8::{Chunk, Piece, Rounded, BLOCK, CHUNK};
use crate::linear::weight::{Codes, Weight};
use crate::x86::avx2::{lanes, load, load_f32};
use crate::x86::prefetch;

/// How far ahead bytes are fetched.
const AHEAD: usize = 2048;

/// Writes the sums of some rows.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn multiply(weight: &Weight<'_>, rows: Range<usize>, x: &Rounded, sums: &mut [f32]) {
    let count = rows.len();
    let (cols, padded) = (weight.cols, weight.cols.next_multiple_of(CHUNK));
    match (weight.codes, x) {
        (Codes::FourBit { packed, .. }, Rounded::FourBit { chunks, table }) => {
            let table = tables(table);
            let tokens = chunks.chunks_exact(padded / CHUNK);
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                for (row, sum) in rows.clone().zip(sums.chunks_exact_mut(1)) {
                    let products = |piece, codes| [product(codes, table, half(x, piece))];
                    put(&by_pieces(weight, packed, row, products), 1, sum);
                }
            }
        }
        (Codes::Int8(codes), Rounded::Int8(pieces)) => {
            let tokens = pieces.chunks_exact(padded / BLOCK);
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                for (row, sum) in rows.clone().zip(sums.chunks_exact_mut(1)) {
                    let codes = &codes[row * cols..(row + 1) * cols];
                    put(&[int8(weight, codes, row, x)], 1, sum);
                }
            }
        }
        _ => unreachable!("x was rounded for this weight"),
    }
}

/// The same with AVX-VNNI; 8-bit codes go the way above.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(crate) fn multiply_vnni(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &Rounded,
    sums: &mut [f32],
) {
    let count = rows.len();
    let (Codes::FourBit { packed, .. }, Rounded::FourBit { chunks, table }) = (weight.codes, x)
    else {
        return multiply(weight, rows, x, sums);
    };
    let table = tables(table);
    let tokens = chunks.chunks_exact(weight.cols.div_ceil(CHUNK));
    for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
        for (row, sum) in rows.clone().zip(sums.chunks_exact_mut(1)) {
            let products = |piece, codes| [product_vnni(codes, table, half(x, piece))];
            put(&by_pieces(weight, packed, row, products), 1, sum);
        }
    }
}

/// Half a chunk: even values, odd values, starts and steps.
type Half<'a> = (&'a [i8; 32], &'a [i8; 32], &'a [i32; 8], &'a [f32; 8]);

/// The values of x that a piece of codes meets.
#[inline(always)]
fn half(x: &[Chunk], piece: usize) -> Half<'_> {
    let (chunk, half) = (&x[piece / 2], piece % 2);
    (
        &chunk.even.as_chunks().0[half],
        &chunk.odd.as_chunks().0[half],
        &chunk.start.as_chunks().0[half],
        &chunk.step.as_chunks().0[half],
    )
}

/// Both tables, in both halves of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn tables(table: &[[u8; 16]; 2]) -> [__m256i; 2] {
    table.map(|half| load(&core::array::from_fn::<u8, 32, _>(|i| half[i % 16])))
}

/// The high and the low nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(codes: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    [_mm256_and_si256(_mm256_srli_epi16::<4>(codes), low), _mm256_and_si256(codes, low)]
}

/// The integers of a piece. Pairs of products fit 16 bits: 2 * 127 * 127.
#[inline]
#[target_feature(enable = "avx2")]
fn product(codes: __m256i, table: [__m256i; 2], (even, odd, start, step): Half<'_>) -> __m256 {
    let codes = nibbles(codes);
    let x = [load(even), load(odd)];
    let sum = |table, weight| {
        let pairs = |i: usize| _mm256_maddubs_epi16(_mm256_shuffle_epi8(table, codes[i]), x[i]);
        let weight = _mm256_set1_epi16(weight);
        let fours = |i| _mm256_madd_epi16(pairs(i), weight);
        _mm256_add_epi32(fours(0), fours(1))
    };
    let start = _mm256_slli_epi32::<7>(load(start));
    let sums = _mm256_add_epi32(_mm256_add_epi32(sum(table[0], 128), sum(table[1], 1)), start);
    _mm256_mul_ps(_mm256_cvtepi32_ps(sums), load_f32(step))
}

/// The integers of a piece.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn product_vnni(codes: __m256i, table: [__m256i; 2], (even, odd, start, step): Half<'_>) -> __m256 {
    let codes = nibbles(codes);
    let x = [load(even), load(odd)];
    let add = |sum, table| {
        let first = _mm256_dpbusd_avx_epi32(sum, _mm256_shuffle_epi8(table, codes[0]), x[0]);
        _mm256_dpbusd_avx_epi32(first, _mm256_shuffle_epi8(table, codes[1]), x[1])
    };
    let high = add(load(start), table[0]);
    let sums = add(_mm256_slli_epi32::<7>(high), table[1]);
    _mm256_mul_ps(_mm256_cvtepi32_ps(sums), load_f32(step))
}

/// The sum of a row of 8-bit codes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn int8(weight: &Weight<'_>, codes: &[i8], row: usize, x: &[Piece]) -> __m256 {
    let blocks = weight.cols / weight.blocksize;
    let mut sum = _mm256_setzero_ps();
    for first in (0..blocks).step_by(8) {
        let scales = load_scales(&weight.scales, row * blocks + first, (blocks - first).min(8));
        let scales = lanes(_mm256_mul_ps(scales, _mm256_set1_ps(STEP)));
        for (block, scale) in (first..blocks).zip(scales) {
            let place = block * weight.blocksize;
            let codes = &codes[place..place + weight.blocksize];
            let mut part = _mm256_setzero_ps();
            for (codes, x) in codes.chunks(BLOCK).zip(&x[place / BLOCK..]) {
                prefetch(codes, AHEAD);
                let integers = _mm256_cvtepi32_ps(int8_product(codes, x));
                part = _mm256_fmadd_ps(integers, _mm256_set1_ps(x.step), part);
            }
            sum = _mm256_fmadd_ps(part, _mm256_set1_ps(scale), sum);
        }
    }
    sum
}

/// The integers of up to 64 codes. Magnitudes of codes are the unsigned factor, x has their signs.
#[inline]
#[target_feature(enable = "avx2")]
fn int8_product(codes: &[i8], x: &Piece) -> __m256i {
    let end: [i8; BLOCK];
    let codes: &[i8; BLOCK] = if let Ok(codes) = codes.try_into() {
        codes
    } else {
        end = core::array::from_fn(|i| codes.get(i).copied().unwrap_or(0));
        &end
    };
    let halves = codes.as_chunks::<32>().0.iter().zip(x.values.as_chunks::<32>().0);
    halves.fold(_mm256_setzero_si256(), |sum, (codes, x)| {
        let (codes, x) = (load(codes), load(x));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    })
}
