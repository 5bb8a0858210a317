//! AVX-512 with VNNI: four products of bytes a lane in one instruction.
//!
//! `vpermb` reads the low 6 bits of an index: with the table four times over, nibbles need no mask.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::linear::matvec::avx512::{by_rows, end_of, group_of, Together};
use crate::linear::matvec::int8::{Chunk, Piece, Rounded, BLOCK, CHUNK};
use crate::linear::matvec::scales_avx512::{load_scales, Places, MAX_CHUNKS};
use crate::linear::weight::{Codes, Weight};
use crate::x86::avx512::{lanes, load, load_f32};
use crate::x86::prefetch;

/// Rows that are multiplied together: they share the loads of x.
const ROWS: usize = 4;
/// The bytes of a group of chunks.
const GROUP: usize = MAX_CHUNKS * CHUNK / 2;

/// Writes the sums of some rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(crate) fn multiply(weight: &Weight<'_>, rows: Range<usize>, x: &Rounded, sums: &mut [f32]) {
    let count = rows.len();
    match (weight.codes, x) {
        (Codes::FourBit { packed, .. }, Rounded::FourBit { chunks, table }) => {
            let table =
                table.map(|half| load(&core::array::from_fn::<u8, 64, _>(|i| half[i % 16])));
            let tokens = chunks.chunks_exact(weight.cols.div_ceil(CHUNK));
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                by_rows::<1, ROWS>(
                    rows.clone(),
                    weight.cols / 2,
                    sums,
                    |rows| four_bit(weight, packed, table, rows, x),
                    |rows| four_bit(weight, packed, table, rows, x),
                );
            }
        }
        (Codes::Int8(codes), Rounded::Int8(pieces)) => {
            let tokens = pieces.chunks_exact(weight.cols.next_multiple_of(CHUNK) / BLOCK);
            for (x, sums) in tokens.zip(sums.chunks_exact_mut(count)) {
                by_rows::<1, ROWS>(
                    rows.clone(),
                    weight.cols,
                    sums,
                    |rows| int8(weight, codes, rows, x),
                    |rows| int8(weight, codes, rows, x),
                );
            }
        }
        _ => unreachable!("x was rounded for this weight"),
    }
}

/// The sums of R rows of 4-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn four_bit<const R: usize>(
    weight: &Weight<'_>,
    packed: &[u8],
    table: [__m512i; 2],
    rows: Together,
    x: &[Chunk],
) -> [[__m512; 1]; R] {
    let places = Places::new(weight);
    let bytes: [&[u8]; R] = core::array::from_fn(|r| &packed[rows.row(r) * weight.cols / 2..]);
    let mut sums = [[_mm512_setzero_ps()]; R];
    let mut ends = [[0; GROUP]; R];
    for (g, x) in x.chunks(places.chunks).enumerate() {
        let first = g * places.chunks;
        let mut scales = [_mm512_setzero_ps(); R];
        let mut groups = [&[0; GROUP]; R];
        let ahead = rows.ahead::<R>(first * 64, weight.cols / 2);
        for (r, end) in ends.iter_mut().enumerate() {
            scales[r] = places.scales(weight, rows.row(r), g);
            groups[r] = group_of(&bytes[r][first * 64..], end);
        }
        for (c, x) in (0..MAX_CHUNKS).zip(x) {
            for r in 0..R {
                prefetch(bytes[r], ahead + 64 * c);
                let codes = load(&groups[r].as_chunks::<64>().0[c]);
                let product = _mm512_mul_ps(product(codes, table, x), load_f32(&x.step));
                let scales = _mm512_permutexvar_ps(load(&places.lanes[c]), scales[r]);
                sums[r][0] = _mm512_fmadd_ps(product, scales, sums[r][0]);
            }
        }
    }
    sums
}

/// The integers of a chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn product(codes: __m512i, table: [__m512i; 2], x: &Chunk) -> __m512 {
    let (high, low) = (_mm512_srli_epi16::<4>(codes), codes);
    let (even, odd) = (load(&x.even), load(&x.odd));
    let sums = load(&x.start);
    let sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(high, table[0]), even);
    let sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(low, table[0]), odd);
    let sums = _mm512_slli_epi32::<7>(sums);
    let sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(high, table[1]), even);
    let sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(low, table[1]), odd);
    _mm512_cvtepi32_ps(sums)
}

/// The sums of R rows of 8-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn int8<const R: usize>(
    weight: &Weight<'_>,
    codes: &[i8],
    rows: Together,
    x: &[Piece],
) -> [[__m512; 1]; R] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let codes: [&[i8]; R] = core::array::from_fn(|r| &codes[rows.row(r) * cols..][..cols]);
    let pieces = cols.div_ceil(BLOCK);
    let a_block = blocksize.div_ceil(BLOCK);
    let mut sums = [[_mm512_setzero_ps()]; R];
    for first in (0..blocks).step_by(16) {
        let count = (blocks - first).min(16);
        let mut scales = [[0.0; 16]; R];
        for (r, scales) in scales.iter_mut().enumerate() {
            let absmax = load_scales(&weight.scales, rows.row(r) * blocks + first, count);
            *scales = lanes(_mm512_mul_ps(absmax, _mm512_set1_ps(STEP)));
        }
        for block in first..first + count {
            let mut parts = [_mm512_setzero_ps(); R];
            for c in block * a_block..((block + 1) * a_block).min(pieces) {
                let x = &x[c];
                let step = _mm512_set1_ps(x.step);
                let ahead = rows.ahead::<R>(c * BLOCK, cols);
                for r in 0..R {
                    prefetch(codes[r], ahead);
                    let rest = &codes[r][c * BLOCK..];
                    let codes = match rest.first_chunk::<BLOCK>() {
                        Some(codes) => load(codes),
                        None => load(&end_of::<_, BLOCK>(rest)),
                    };
                    let unsigned = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
                    let sum = _mm512_dpbusd_epi32(load(&x.start), unsigned, load(&x.values));
                    parts[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, parts[r]);
                }
            }
            for r in 0..R {
                let scale = _mm512_set1_ps(scales[r][block - first]);
                sums[r][0] = _mm512_fmadd_ps(parts[r], scale, sums[r][0]);
            }
        }
    }
    sums
}
