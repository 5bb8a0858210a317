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
/// Bytes of a row from which rows lie in different pages, or nearly so.
const SHORT: usize = 2048;
/// How far ahead bytes are fetched, in each row.
const AHEAD: usize = 4096;

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
                weight.cols / 2,
                sums,
                |rows| four_bit(weight, packed, table, rows, x),
                |rows| four_bit(weight, packed, table, rows, x),
            );
        }
        Codes::Int8(codes) => by_rows::<M, R>(
            rows,
            weight.cols,
            sums,
            |rows| int8(weight, codes, rows, x),
            |rows| int8(weight, codes, rows, x),
        ),
    }
}

/// Rows that are multiplied together.
#[derive(Clone, Copy)]
pub(crate) struct Together {
    first: usize,
    /// Rows from each to the next.
    apart: usize,
    /// Rows that follow each before the next is reached, itself included.
    run: usize,
}

impl Together {
    /// Row `r` of them.
    #[inline(always)]
    pub(crate) fn row(self, r: usize) -> usize {
        self.first + r * self.apart
    }

    /// Where to fetch while byte `at` of each of R rows is read, from the row's first byte on: in
    /// the rows that follow it, or in those that follow at this place in the next strip.
    #[inline(always)]
    pub(crate) fn ahead<const R: usize>(self, at: usize, row_bytes: usize) -> usize {
        let next = at + AHEAD;
        let strip = if next < self.run * row_bytes { 0 } else { (R - 1) * self.apart * row_bytes };
        next + strip
    }
}

/// Writes the sums of all rows: R at a time, then the last few one by one.
///
/// The processor follows one stream of reads a page. Of short rows R runs are read side by side;
/// long ones are far enough apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(crate) fn by_rows<const M: usize, const R: usize>(
    rows: Range<usize>,
    row_bytes: usize,
    sums: &mut [f32],
    several: impl Fn(Together) -> [[__m512; M]; R],
    single: impl Fn(Together) -> [[__m512; M]; 1],
) {
    let count = rows.len();
    let mut put = |together: Together, found: &[[__m512; M]]| {
        for (r, found) in found.iter().enumerate() {
            for (token, &sum) in found.iter().enumerate() {
                sums[token * count + together.row(r) - rows.start] = _mm512_reduce_add_ps(sum);
            }
        }
    };
    let (groups, start) = (count / R, rows.start);
    for i in 0..groups {
        let together = if row_bytes < SHORT {
            Together { first: start + i, apart: groups, run: groups - i }
        } else {
            Together { first: start + i * R, apart: 1, run: 1 }
        };
        put(together, &several(together));
    }
    for first in start + groups * R..rows.end {
        let together = Together { first, apart: 1, run: 1 };
        put(together, &single(together));
    }
}

/// The sums of R rows of 4-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn four_bit<const M: usize, const R: usize>(
    weight: &Weight<'_>,
    packed: &[u8],
    table: __m512,
    rows: Together,
    x: &[f32],
) -> [[__m512; M]; R] {
    let places = Places::new(weight);
    let chunks = weight.cols.div_ceil(CHUNK);
    let bytes: [&[u8]; R] = core::array::from_fn(|r| &packed[rows.row(r) * weight.cols / 2..]);
    let x = x.as_chunks::<16>().0.as_chunks::<8>().0;
    let x: [&[[[f32; 16]; 8]]; M] = by_token(x);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    let mut ends = [[0; GROUP]; R];
    for (g, first) in (0..chunks).step_by(places.chunks).enumerate() {
        let count = places.chunks.min(chunks - first);
        let mut scales = [_mm512_setzero_ps(); R];
        let mut groups = [&[0; GROUP]; R];
        let ahead = rows.ahead::<R>(first * 64, weight.cols / 2);
        for (r, end) in ends.iter_mut().enumerate() {
            scales[r] = places.scales(weight, rows.row(r), g);
            groups[r] = group_of(&bytes[r][first * 64..], end);
        }
        let mut group_of_x: [&[_]; M] = [&[]; M];
        for m in 0..M {
            group_of_x[m] = &x[m][first..first + count];
        }
        for c in (0..MAX_CHUNKS).take_while(|&c| c < count) {
            let (mut windows, mut of_x) = ([&[0; WINDOW]; R], [&x[0][0]; M]);
            for r in 0..R {
                prefetch(bytes[r], ahead + 64 * c);
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

/// The sums of R rows of 8-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn int8<const M: usize, const R: usize>(
    weight: &Weight<'_>,
    codes: &[i8],
    rows: Together,
    x: &[f32],
) -> [[__m512; M]; R] {
    let Weight { cols, blocksize, .. } = *weight;
    let blocks = cols / blocksize;
    let x: [&[f32]; M] = by_token(x);
    let codes: [&[i8]; R] = core::array::from_fn(|r| &codes[rows.row(r) * cols..][..cols]);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    for first in (0..blocks).step_by(16) {
        let end = blocks.min(first + 16);
        let mut scales = [[0.0; 16]; R];
        for (r, scales) in scales.iter_mut().enumerate() {
            let absmax = load_scales(&weight.scales, rows.row(r) * blocks + first, end - first);
            *scales = lanes(_mm512_mul_ps(absmax, _mm512_set1_ps(STEP)));
        }
        if blocksize.is_multiple_of(64) {
            int8_whole(rows, codes, x, blocksize / 64, first..end, &scales, &mut sums);
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
    rows: Together,
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
            let ahead = rows.ahead::<R>(p * 64, 64 * pieces);
            for codes in codes {
                prefetch(codes, ahead);
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
            prefetch(codes, AHEAD);
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
