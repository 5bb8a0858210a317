//! AVX-512: codes are looked up where they lie, one `vpermps` for 16 of them.
//!
//! ```text
//! chunk      64 bytes = 128 codes = 16 lanes of 8 codes
//! x          the 8 codes of a lane meet 8 vectors: vector j has the values of nibble j of each lane
//! lookup     vpermps reads the low 4 bits of a lane, whatever is above them: loads at byte 0, 1, 2
//!            and 3 bring the low nibbles there, one shift of each the high ones
//! scales     16 at a time, spread over the lanes of each chunk by one more vpermps
//! ```

use std::arch::x86_64::*;
use std::borrow::Cow;
use std::ops::Range;

use crate::dequantize_int8::STEP;
use crate::linear::matvec::by_token;
use crate::linear::matvec::scales_avx512::{load_scales, Places, MAX_CHUNKS};
use crate::linear::weight::{Codes, Weight};
use crate::x86::avx2::load_half;
use crate::x86::avx512::{lanes, load, load_bytes, load_f32, load_some};
use crate::x86::prefetch;

/// Codes that are multiplied together.
const CHUNK: usize = 128;
/// The bytes that the four loads of a chunk touch.
const WINDOW: usize = CHUNK / 2 + 3;
/// The bytes that those of a group of chunks touch.
const GROUP: usize = MAX_CHUNKS * CHUNK / 2 + 3;
/// How far ahead bytes are fetched, in chunks.
const AHEAD: usize = 64;

/// The tokens in the order of [`exact`], each filled up with zeros to whole chunks.
pub(crate) fn arrange<'a>(x: &'a [f32], weight: &Weight<'_>) -> Cow<'a, [f32]> {
    if matches!(weight.codes, Codes::Int8(_)) {
        return Cow::Borrowed(x);
    }
    let padded = weight.cols.next_multiple_of(CHUNK);
    let mut ordered = vec![0.0; x.len() / weight.cols * padded];
    for (x, ordered) in x.chunks_exact(weight.cols).zip(ordered.chunks_exact_mut(padded)) {
        for (x, chunk) in x.chunks(CHUNK).zip(ordered.as_chunks_mut::<CHUNK>().0) {
            for (lane, eight) in x.as_chunks::<8>().0.iter().enumerate() {
                for (j, x) in eight.iter().enumerate() {
                    chunk[(j ^ 1) * 16 + lane] = *x; // the even code is in the high nibble
                }
            }
        }
    }
    Cow::Owned(ordered)
}

/// Writes the sums of some rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn exact(weight: &Weight<'_>, rows: Range<usize>, x: &[f32], sums: &mut [f32]) {
    match sums.len() / rows.len() {
        1 => exact_tokens::<1, 4>(weight, rows, x, sums),
        2 => exact_tokens::<2, 2>(weight, rows, x, sums),
        3 => exact_tokens::<3, 2>(weight, rows, x, sums),
        _ => exact_tokens::<4, 2>(weight, rows, x, sums),
    }
}

/// Writes the sums of M tokens, R rows at a time: these share the loads of x.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn exact_tokens<const M: usize, const R: usize>(
    weight: &Weight<'_>,
    rows: Range<usize>,
    x: &[f32],
    sums: &mut [f32],
) {
    match weight.codes {
        Codes::FourBit { packed, table } => {
            let table = load_f32(table);
            by_rows::<M, R>(
                rows,
                sums,
                |row| four_bit(weight, packed, table, row, x),
                |row| four_bit(weight, packed, table, row, x),
            );
        }
        Codes::Int8(codes) => by_rows::<M, R>(
            rows,
            sums,
            |row| int8(weight, codes, row, x),
            |row| int8(weight, codes, row, x),
        ),
    }
}

/// Writes the sums of all rows: R at a time, then the last few one by one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn by_rows<const M: usize, const R: usize>(
    rows: Range<usize>,
    sums: &mut [f32],
    several: impl Fn(usize) -> [[__m512; M]; R],
    single: impl Fn(usize) -> [[__m512; M]; 1],
) {
    let count = rows.len();
    let mut put = |i: usize, found: &[[__m512; M]]| {
        for (i, found) in (i..).zip(found) {
            for (token, &sum) in found.iter().enumerate() {
                sums[token * count + i] = _mm512_reduce_add_ps(sum);
            }
        }
    };
    let whole = count / R * R;
    (0..whole).step_by(R).for_each(|i| put(i, &several(rows.start + i)));
    (whole..count).for_each(|i| put(i, &single(rows.start + i)));
}

/// The sums of R rows of 4-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn four_bit<const M: usize, const R: usize>(
    weight: &Weight<'_>,
    packed: &[u8],
    table: __m512,
    row: usize,
    x: &[f32],
) -> [[__m512; M]; R] {
    let places = Places::new(weight);
    let chunks = weight.cols.div_ceil(CHUNK);
    let bytes: [&[u8]; R] = core::array::from_fn(|r| &packed[(row + r) * weight.cols / 2..]);
    let x = x.as_chunks::<16>().0.as_chunks::<8>().0;
    let x: [&[[[f32; 16]; 8]]; M] = by_token(x);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    let mut ends = [[0; GROUP]; R];
    for (g, first) in (0..chunks).step_by(places.chunks).enumerate() {
        let count = places.chunks.min(chunks - first);
        let mut scales = [_mm512_setzero_ps(); R];
        let mut groups = [&[0; GROUP]; R];
        let mut fetched = [0; R];
        for (r, end) in ends.iter_mut().enumerate() {
            scales[r] = places.scales(weight, row + r, g, R);
            fetched[r] = ahead(r, first, chunks, R);
            groups[r] = group_of(&bytes[r][first * 64..], end);
        }
        let mut group_of_x: [&[_]; M] = [&[]; M];
        for m in 0..M {
            group_of_x[m] = &x[m][first..first + count];
        }
        for c in (0..MAX_CHUNKS).take_while(|&c| c < count) {
            let (mut windows, mut of_x) = ([&[0; WINDOW]; R], [&x[0][0]; M]);
            for r in 0..R {
                prefetch(bytes[0], fetched[r] + 64 * c);
                windows[r] = groups[r][64 * c..].first_chunk().expect("8 chunks and 3 bytes");
            }
            for m in 0..M {
                of_x[m] = &group_of_x[m][c];
            }
            let products = products(windows, of_x, table);
            for r in 0..R {
                let scales = _mm512_permutexvar_ps(load(&places.lanes[c]), scales[r]);
                for m in 0..M {
                    sums[r][m] = _mm512_fmadd_ps(products[r][m], scales, sums[r][m]);
                }
            }
        }
    }
    sums
}

/// The first bytes of some: in place, or if there are fewer a copy with zeros behind it.
#[inline(always)]
pub(crate) fn group_of<'a, const N: usize>(bytes: &'a [u8], end: &'a mut [u8; N]) -> &'a [u8; N] {
    if let Some(group) = bytes.first_chunk() {
        return group;
    }
    *end = end_of(bytes);
    end
}

/// The products of R chunks of codes with M of x, in 16 sums each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn products<const M: usize, const R: usize>(
    windows: [&[u8; WINDOW]; R],
    x: [&[[f32; 16]; 8]; M],
    table: __m512,
) -> [[__m512; M]; R] {
    let mut products = [[_mm512_setzero_ps(); M]; R];
    for byte in 0..4 {
        for (window, products) in windows.iter().zip(&mut products) {
            let codes = load(window[byte..].first_chunk::<64>().expect("67 bytes"));
            let odd = _mm512_permutexvar_ps(codes, table);
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table);
            for (x, product) in x.iter().zip(products) {
                *product = _mm512_fmadd_ps(odd, load_f32(&x[2 * byte]), *product);
                *product = _mm512_fmadd_ps(even, load_f32(&x[2 * byte + 1]), *product);
            }
        }
    }
    products
}

/// The last bytes of the codes, and zeros: nothing is read past the end.
#[cold]
pub(crate) fn end_of<T: Copy + Default, const N: usize>(bytes: &[T]) -> [T; N] {
    core::array::from_fn(|i| bytes.get(i).copied().unwrap_or_default())
}

/// Where to fetch while the chunks from `c` on of row `r` of some are multiplied, in bytes from the
/// first of these rows on.
///
/// Short rows share a page: the next ones are fetched in the order of their addresses. Longer ones
/// are fetched further on in the row, or in the row that will be read there when these are done.
#[inline(always)]
pub(crate) fn ahead(r: usize, c: usize, chunks: usize, rows: usize) -> usize {
    let next = c + AHEAD;
    64 * if 2 * chunks < AHEAD {
        rows * chunks + c * rows + r
    } else if next < chunks {
        r * chunks + next
    } else {
        (r + rows - 1) * chunks + next
    }
}

/// The sums of R rows of 8-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn int8<const M: usize, const R: usize>(
    weight: &Weight<'_>,
    codes: &[i8],
    row: usize,
    x: &[f32],
) -> [[__m512; M]; R] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let x: [&[f32]; M] = by_token(x);
    let codes: [&[i8]; R] =
        core::array::from_fn(|r| &codes[(row + r) * cols..(row + r + 1) * cols]);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    for first in (0..blocks).step_by(16) {
        let end = blocks.min(first + 16);
        let mut scales = [[0.0; 16]; R];
        for (r, scales) in scales.iter_mut().enumerate() {
            let absmax = load_scales(&weight.scales, (row + r) * blocks + first, end - first);
            *scales = lanes(_mm512_mul_ps(absmax, _mm512_set1_ps(STEP)));
        }
        if blocksize.is_multiple_of(64) {
            int8_whole(codes, x, blocksize / 64, first..end, &scales, &mut sums);
        } else {
            int8_any(codes, x, blocksize, first..end, &scales, &mut sums);
        }
    }
    sums
}

/// Adds the products of up to 16 blocks of `a_block` times 64 codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn int8_whole<const M: usize, const R: usize>(
    codes: [&[i8]; R],
    x: [&[f32]; M],
    a_block: usize,
    blocks: Range<usize>,
    scales: &[[f32; 16]; R],
    sums: &mut [[__m512; M]; R],
) {
    let pieces = codes[0].len() / 64;
    let codes = codes.map(|codes| &codes.as_chunks::<16>().0.as_chunks::<4>().0[..pieces]);
    let x = x.map(|x| &x.as_chunks::<16>().0.as_chunks::<4>().0[..pieces]);
    for (i, block) in blocks.enumerate() {
        let mut products = [[_mm512_setzero_ps(); M]; R];
        for p in block * a_block..(block + 1) * a_block {
            for r in 0..R {
                prefetch(codes[0], ahead(r, p, pieces, R));
            }
            for j in 0..4 {
                let mut of_x = [_mm512_setzero_ps(); M];
                for m in 0..M {
                    of_x[m] = load_f32(&x[m][p][j]);
                }
                for r in 0..R {
                    let codes = _mm512_cvtepi8_epi32(load_half(&codes[r][p][j]));
                    let codes = _mm512_cvtepi32_ps(codes);
                    for m in 0..M {
                        products[r][m] = _mm512_fmadd_ps(codes, of_x[m], products[r][m]);
                    }
                }
            }
        }
        for r in 0..R {
            let scale = _mm512_set1_ps(scales[r][i]);
            for m in 0..M {
                sums[r][m] = _mm512_fmadd_ps(products[r][m], scale, sums[r][m]);
            }
        }
    }
}

/// Adds the products of up to 16 blocks of any length.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn int8_any<const M: usize, const R: usize>(
    codes: [&[i8]; R],
    x: [&[f32]; M],
    blocksize: usize,
    blocks: Range<usize>,
    scales: &[[f32; 16]; R],
    sums: &mut [[__m512; M]; R],
) {
    for (i, block) in blocks.enumerate() {
        let place = block * blocksize..(block + 1) * blocksize;
        for r in 0..R {
            let codes = &codes[r][place.clone()];
            prefetch(codes, 64 * AHEAD);
            let scale = _mm512_set1_ps(scales[r][i]);
            for m in 0..M {
                let parts = codes.chunks(16).zip(x[m][place.clone()].chunks(16));
                let mut product = _mm512_setzero_ps();
                for (codes, x) in parts {
                    let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(codes)));
                    product = _mm512_fmadd_ps(codes, load_some(x), product);
                }
                sums[r][m] = _mm512_fmadd_ps(product, scale, sums[r][m]);
            }
        }
    }
}
