//! The thin products of an adapter and its gradients, for bfloat16 x and dY.
//!
//! ```text
//! thin        sums (tokens, rank)     =  x (16 tokens, 32 features)  x  pairs of w
//! gradient    sums (rank, features)   =  g^T (16 ranks, 32 tokens)   x  pairs of x
//! ```
//!
//! The fp32 factor is the sum of two bfloat16 numbers to 16 bits of its mantissa: both are
//! multiplied.

use std::arch::x86_64::*;

use half::bf16;

use crate::error::CodecError;
use crate::linear::amx::tiles::{Stack, Tiles, LINES};
use crate::parallel;
use crate::scratch::{Line, Scratch};
use crate::simd::Engine;
use crate::x86::avx512::{load, load_f32, store};

/// Rows of a left tile, columns of a right one.
const SIDE: usize = 16;
/// What is summed over in a tile.
const DEPTH: usize = 32;
/// Columns of a gradient that a thread takes at a time.
const STRIP: usize = 256;

/// `scaling * x w`, (M, features) by (features, rank).
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The tiles must have been granted.
pub(crate) unsafe fn thin(
    engine: Engine,
    x: &[bf16],
    w: &[f32],
    rank: usize,
    scaling: f32,
) -> Result<Vec<f32>, CodecError> {
    let features = w.len() / rank;
    let depth = features.div_ceil(DEPTH);
    let sides = rank.div_ceil(SIDE);
    let mut right = Scratch::<Line>::new(sides * depth * 2 * LINES);
    for (side, right) in right.chunks_exact_mut(depth * 2 * LINES).enumerate() {
        // SAFETY: all processors with tiles have the vectors.
        unsafe { pack_pairs(w, rank, side * SIDE, right) };
    }
    let mut sums = vec![0.0; x.len() / features * rank];
    let jobs = sums.chunks_mut(2 * SIDE * rank).zip(x.chunks(2 * SIDE * features));
    parallel::for_each(x.len() / 4, engine, jobs, |(sums, x)| {
        // SAFETY: the caller vouches for the tiles.
        let tiles = unsafe { Tiles::configure() };
        for (side, right) in right.chunks_exact(depth * 2 * LINES).enumerate() {
            // SAFETY: as above.
            let found = unsafe { thin_group(&tiles, x, features, right) };
            let columns = side * SIDE..((side + 1) * SIDE).min(rank);
            for (token, sums) in sums.chunks_exact_mut(rank).enumerate() {
                let line = token / SIDE * 2 * LINES + token % SIDE;
                let (high, low) = (floats(&found[line]), floats(&found[line + LINES]));
                for (sum, (high, low)) in sums[columns.clone()].iter_mut().zip(high.zip(low)) {
                    *sum = scaling * (high + low);
                }
            }
        }
    })?;
    Ok(sums)
}

/// `g^T x`, (rank, M) by (M, features), by strips of columns, (rank, strip), and their width.
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The tiles must have been granted.
pub(crate) unsafe fn gradient(
    engine: Engine,
    x: &[bf16],
    g: &[f32],
    rank: usize,
    features: usize,
) -> Result<(Vec<f32>, usize), CodecError> {
    let tokens = g.len() / rank;
    let depth = tokens.div_ceil(DEPTH);
    let sides = rank.div_ceil(SIDE);
    let mut left = Scratch::<Line>::new(sides * depth * 2 * LINES);
    for (side, left) in left.chunks_exact_mut(depth * 2 * LINES).enumerate() {
        pack_turned(g, rank, side * SIDE, left);
    }
    let mut sums = vec![0.0; rank * features];
    let jobs = sums.chunks_mut(STRIP * rank).enumerate();
    parallel::for_each(x.len() / 4, engine, jobs, |(job, sums)| {
        // SAFETY: the caller vouches for the tiles.
        let tiles = unsafe { Tiles::configure() };
        let (first, width) = (job * STRIP, sums.len() / rank);
        for (side, left) in left.chunks_exact(depth * 2 * LINES).enumerate() {
            for start in (0..width).step_by(2 * SIDE) {
                // SAFETY: as above.
                let found = unsafe { gradient_group(&tiles, x, features, first + start, left) };
                for (row, sums) in sums.chunks_exact_mut(width).skip(side * SIDE).enumerate() {
                    let sums = &mut sums[start..width.min(start + 2 * SIDE)];
                    for (half, sums) in sums.chunks_mut(SIDE).enumerate().take(2) {
                        let Some(high) = found.get(half * LINES + row).filter(|_| row < SIDE)
                        else {
                            break;
                        };
                        let low = &found[(2 + half) * LINES + row];
                        let both = floats(high).zip(floats(low));
                        sums.iter_mut().zip(both).for_each(|(sum, (high, low))| *sum = high + low);
                    }
                }
            }
        }
    })?;
    Ok((sums, STRIP))
}

/// Sums of up to 32 tokens: accumulators of the first 16 with high and low parts, then the others.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn thin_group(
    tiles: &Tiles,
    x: &[bf16],
    features: usize,
    right: &[Line],
) -> [Line; 4 * LINES] {
    let mut found = [Line([0; 64]); 4 * LINES];
    let tokens = x.len() / features;
    tiles.zero();
    for (step, right) in right.as_chunks::<{ 2 * LINES }>().0.iter().enumerate() {
        let [high, low] = halves(right);
        let start = step * DEPTH;
        if tokens == 2 * SIDE && start + DEPTH <= features {
            tiles.multiply_rows(&x[start..], features, high, low);
        } else {
            let mut room = [bf16::ZERO; 2 * SIDE * DEPTH];
            for (to, from) in room.chunks_exact_mut(DEPTH).zip(x.chunks_exact(features)) {
                let from = &from[start..features.min(start + DEPTH)];
                to[..from.len()].copy_from_slice(from);
            }
            tiles.multiply_rows(&room, DEPTH, high, low);
        }
    }
    tiles.store(&mut found);
    found
}

/// Sums of 32 columns: accumulators of the high part with both halves, then of the low part.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn gradient_group(
    tiles: &Tiles,
    x: &[bf16],
    features: usize,
    first: usize,
    left: &[Line],
) -> [Line; 4 * LINES] {
    let mut found = [Line([0; 64]); 4 * LINES];
    let mut right = [Line([0; 64]); 2 * LINES];
    tiles.zero();
    for (step, left) in left.as_chunks::<{ 2 * LINES }>().0.iter().enumerate() {
        for pair in 0..LINES {
            let row = |i: usize| columns(x, (step * LINES + pair) * 2 + i, features, first);
            let (even, odd) = (row(0), row(1));
            for (half, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                let pairs = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
                store(&mut right[half * LINES + pair].0, pairs);
            }
        }
        let [first, second] = halves(&right);
        tiles.multiply_2x2(Stack::dense(left), [first, second].map(|b| Stack::dense(b)));
    }
    tiles.store(&mut found);
    found
}

/// 32 values of a row from a column on, in the low halves of 32-bit lanes; zero outside.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn columns(x: &[bf16], row: usize, features: usize, first: usize) -> [__m512i; 2] {
    let row = x.get(row * features..(row + 1) * features).unwrap_or_default();
    let rest = row.get(first..).unwrap_or_default();
    let mut room = [bf16::ZERO; 32];
    let values = rest.first_chunk::<32>().unwrap_or_else(|| {
        room[..rest.len()].copy_from_slice(rest);
        &room
    });
    let both = load(values);
    [
        _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)),
        _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(both)),
    ]
}

/// Packs 16 columns of `w` from `first` on as right tiles: for each 32 rows, one of the high parts
/// and one of the low parts.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_pairs(w: &[f32], rank: usize, first: usize, right: &mut [Line]) {
    let row = |row: usize| {
        let row = w.get(row * rank..(row + 1) * rank).unwrap_or_default();
        let rest = row.get(first..).unwrap_or_default();
        let mut room = [0.0; SIDE];
        let values = rest.first_chunk::<SIDE>().unwrap_or_else(|| {
            room[..rest.len()].copy_from_slice(rest);
            &room
        });
        parts(load_f32(values))
    };
    for (step, lines) in right.as_chunks_mut::<{ 2 * LINES }>().0.iter_mut().enumerate() {
        for pair in 0..LINES {
            let (even, odd) = (row((step * LINES + pair) * 2), row((step * LINES + pair) * 2 + 1));
            for (part, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                let pairs = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
                store(&mut lines[part * LINES + pair].0, pairs);
            }
        }
    }
}

/// The bfloat16 numbers nearest to floats and to what is left of these, in low halves of lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn parts(values: __m512) -> [__m512i; 2] {
    let bits = |values: __m512| {
        let halves = _mm512_cvtneps_pbh(values);
        // SAFETY: both are 32 bytes, and any bytes are a vector of integers.
        _mm512_cvtepu16_epi32(unsafe { core::mem::transmute::<__m256bh, __m256i>(halves) })
    };
    let high = bits(values);
    let rest = _mm512_sub_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)));
    [high, bits(rest)]
}

/// Packs 16 columns of `g` from `first` on as left tiles: for each 32 rows, one of the high parts
/// and one of the low parts.
fn pack_turned(g: &[f32], rank: usize, first: usize, left: &mut [Line]) {
    for (step, lines) in left.as_chunks_mut::<{ 2 * LINES }>().0.iter_mut().enumerate() {
        for column in 0..SIDE {
            for token in 0..DEPTH {
                let at = (step * DEPTH + token) * rank + first + column;
                let value = g.get(at).copied().filter(|_| first + column < rank).unwrap_or(0.0);
                let high = bf16::from_f32(value);
                let low = bf16::from_f32(value - high.to_f32());
                let place = 2 * token..2 * token + 2;
                lines[column].0[place.clone()].copy_from_slice(&high.to_le_bytes());
                lines[LINES + column].0[place].copy_from_slice(&low.to_le_bytes());
            }
        }
    }
}

/// Two tiles.
fn halves(lines: &[Line; 2 * LINES]) -> [&[Line; LINES]; 2] {
    let [first, second] = lines.as_chunks::<LINES>().0 else { unreachable!("two tiles") };
    [first, second]
}

fn floats(line: &Line) -> impl Iterator<Item = f32> + '_ {
    line.0.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
}
