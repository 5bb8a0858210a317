//! AVX-512 with products of bfloat16: codes become pairs of values in registers.
//!
//! ```text
//! chunk    64 bytes = 128 codes; a shift, a mask and one `vpermw` give every fourth value, from the
//!          table times the scale of the block, rounded to bfloat16
//! x        in the same order, each token filled up with zeros to whole chunks
//! ```
//!
//! W is the weight as `dequantize` gives it in bfloat16, but that subnormal numbers are zeros.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use crate::linear::avx512::decode::{Decoder, CHUNK, CHUNK_BYTES};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::dense::terms::Pair;
use crate::linear::weight::Weight;
use crate::scratch::Scratch;
use crate::x86::avx512::load;
use crate::x86::prefetch;

/// Vectors of a chunk.
const VECTORS: usize = 4;
/// Pairs of a vector.
const LANES: usize = 16;
/// How far ahead bytes are fetched, in each row.
const AHEAD: usize = 1024;
/// Most tokens of a call.
pub(crate) const MAX_TOKENS: usize = 8;

/// The tokens in the order of [`multiply`].
pub(crate) fn arrange(x: &[bf16], cols: usize) -> Scratch<Pair> {
    let padded = cols.next_multiple_of(CHUNK);
    let mut ordered = Scratch::new(x.len() / cols * padded / 2);
    ordered.fill([bf16::ZERO; 2]);
    for (x, to) in x.chunks_exact(cols).zip(ordered.chunks_exact_mut(padded / 2)) {
        let chunks = to.as_flattened_mut().as_chunks_mut::<CHUNK>().0;
        for (x, chunk) in x.chunks(CHUNK).zip(chunks) {
            for (i, four) in x.as_chunks::<4>().0.iter().enumerate() {
                for (j, x) in four.iter().enumerate() {
                    chunk[(j ^ 1) * 2 * LANES + i] = *x; // the even code is in the high nibble
                }
            }
        }
    }
    ordered
}

/// Writes the sums of some rows for up to [`MAX_TOKENS`] tokens, (M, rows).
///
/// For [`Weight::chunks_have_scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) fn multiply(weight: &Weight<'_>, rows: Range<usize>, x: &[Pair], sums: &mut [f32]) {
    let Some(nibbles) = Nibbles::of(weight) else { return };
    match sums.len() / rows.len() {
        1 => tokens::<1, 4, 2>(&nibbles, rows, x, sums),
        2 => tokens::<2, 4, 2>(&nibbles, rows, x, sums),
        3 => tokens::<3, 2, 2>(&nibbles, rows, x, sums),
        4 => tokens::<4, 2, 2>(&nibbles, rows, x, sums),
        5 => tokens::<5, 2, 1>(&nibbles, rows, x, sums),
        6 => tokens::<6, 2, 1>(&nibbles, rows, x, sums),
        7 => tokens::<7, 2, 1>(&nibbles, rows, x, sums),
        _ => tokens::<8, 2, 1>(&nibbles, rows, x, sums),
    }
}

/// M tokens, R rows at a time, which share the loads of x; A sums of each pair of these.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn tokens<const M: usize, const R: usize, const A: usize>(
    nibbles: &Nibbles<'_>,
    rows: Range<usize>,
    x: &[Pair],
    sums: &mut [f32],
) {
    let (cols, count) = (nibbles.weight.cols, rows.len());
    let chunks = cols.div_ceil(CHUNK);
    let scales = nibbles.scales(rows.clone(), chunks);
    let codes = &nibbles.packed[rows.start * cols / 2..rows.end * cols / 2];
    let weight = Strip { decoder: Decoder::new(nibbles.table), codes, scales: &scales, chunks };
    let x: [&[Pair]; M] = core::array::from_fn(|m| &x[m * chunks * CHUNK / 2..]);
    let x = x.map(|x| &x.as_chunks::<LANES>().0.as_chunks::<VECTORS>().0[..chunks]);
    let whole = count / R * R;
    for row in (0..whole).step_by(R) {
        let found = weight.rows::<M, R, A>(row, cols / 2, &x);
        for (m, found) in found.iter().enumerate() {
            sums[m * count + row..][..R].copy_from_slice(found);
        }
    }
    for row in whole..count {
        let found = weight.rows::<M, 1, A>(row, cols / 2, &x);
        for (m, found) in found.iter().enumerate() {
            sums[m * count + row] = found[0];
        }
    }
}

/// Some rows of W.
struct Strip<'a> {
    decoder: Decoder,
    codes: &'a [u8],
    /// (rows, chunks, 2)
    scales: &'a [f32],
    chunks: usize,
}

/// A token, by chunks.
type Token<'a> = &'a [[[Pair; LANES]; VECTORS]];

impl Strip<'_> {
    /// The sums of R rows for each token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn rows<const M: usize, const R: usize, const A: usize>(
        &self,
        first: usize,
        bytes_per_row: usize,
        x: &[Token<'_>; M],
    ) -> [[f32; R]; M] {
        let codes: [&[u8]; R] =
            core::array::from_fn(|r| &self.codes[(first + r) * bytes_per_row..][..bytes_per_row]);
        let scales: [&[[f32; 2]]; R] = core::array::from_fn(|r| {
            let scales = &self.scales[(first + r) * self.chunks * 2..][..self.chunks * 2];
            scales.as_chunks().0
        });
        let chunks = codes.map(|codes| codes.as_chunks::<CHUNK_BYTES>());
        let whole = bytes_per_row / CHUNK_BYTES;
        let mut sums = [[[_mm512_setzero_ps(); A]; R]; M];
        #[expect(clippy::needless_range_loop)] // of several rows at once
        for chunk in 0..whole {
            let values = core::array::from_fn(|r| {
                let codes = &chunks[r].0[chunk];
                prefetch(codes, AHEAD);
                self.decoder.row(codes, &scales[r][chunk])
            });
            add::<M, R, A>(&values, x, chunk, &mut sums);
        }
        if whole < self.chunks {
            let values = core::array::from_fn(|r| {
                let mut codes = [0; CHUNK_BYTES];
                codes[..chunks[r].1.len()].copy_from_slice(chunks[r].1);
                self.decoder.row(&codes, &scales[r][whole])
            });
            add::<M, R, A>(&values, x, whole, &mut sums);
        }
        sums.map(|sums| {
            sums.map(|sums| {
                let sum = sums.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
                sum.map_or(0.0, |sum| _mm512_reduce_add_ps(sum))
            })
        })
    }
}

/// Adds the products of a chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add<const M: usize, const R: usize, const A: usize>(
    values: &[[__m512i; VECTORS]; R],
    x: &[Token<'_>; M],
    chunk: usize,
    sums: &mut [[[__m512; A]; R]; M],
) {
    for (sums, x) in sums.iter_mut().zip(x) {
        for (j, x) in x[chunk].iter().enumerate() {
            let x = pairs(load(x));
            for (sums, values) in sums.iter_mut().zip(values) {
                let sum = &mut sums[j % A];
                *sum = _mm512_dpbf16_ps(*sum, pairs(values[j]), x);
            }
        }
    }
}

/// The same bits.
#[inline(always)]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, of which any are values.
    unsafe { core::mem::transmute::<__m512i, __m512bh>(bits) }
}

const _: () = assert!(CHUNK_BYTES * 2 == VECTORS * LANES * 2);
