//! Tokens rounded to bytes, and packed as right-hand tiles.

use std::arch::x86_64::*;

use crate::error::CodecError;
use crate::linear::adapter::Floats;
use crate::linear::amx::int8::TILES;
use crate::linear::amx::pack::groups;
use crate::linear::amx::tiles::{LINES, TOKENS};
use crate::linear::amx::transpose::transpose;
use crate::linear::avx512::bytes::{inverse, step_of, to_bytes};
use crate::linear::avx512::decode::CHUNK;
use crate::parallel;
use crate::scratch::{Line, Scratch};
use crate::simd::Engine;
use crate::values::Values;
use crate::x86::avx512::{load, store};

/// Tokens as bytes in right-hand tiles: for each 16, for each chunk of 128 columns, two tiles.
pub(super) struct Packed {
    pub(super) tiles: Scratch<Line>,
    /// What the bytes of a token are multiplied by.
    pub(super) scales: Scratch<f32>,
    pub(super) chunks: usize,
}

impl Packed {
    pub(super) fn new(
        engine: Engine,
        x: Values<'_>,
        cols: usize,
        nibbles: bool,
    ) -> Result<Self, CodecError> {
        let tokens = x.len() / cols;
        let chunks = cols.div_ceil(CHUNK);
        let groups = groups(tokens, nibbles);
        let lines = chunks * TILES * LINES;
        let mut tiles = Scratch::<Line>::new(groups * lines);
        let mut scales = Scratch::<f32>::new(groups * TOKENS);
        let jobs = tiles.chunks_mut(lines).zip(scales.chunks_mut(TOKENS)).enumerate();
        parallel::for_each(x.len(), engine, jobs, |(group, (tiles, scales))| {
            let first = (group * TOKENS).min(tokens) * cols;
            let last = ((group + 1) * TOKENS).min(tokens) * cols;
            let floats = Floats::new(engine.bodies, x.split_at(last).0.split_at(first).1);
            // SAFETY: the caller found the tiles, and all such processors have the vectors.
            unsafe { pack_group(floats.chunks(cols), nibbles, tiles, scales) };
        })?;
        Ok(Self { tiles, scales, chunks })
    }

    pub(super) fn group(&self, group: usize) -> &[Line] {
        let lines = self.chunks * TILES * LINES;
        &self.tiles[group * lines..(group + 1) * lines]
    }
}

/// Rounds and packs up to 16 rows; the tokens after them are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_group<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    nibbles_first: bool,
    tiles: &mut [Line],
    scales: &mut [f32],
) {
    let mut all = [&[][..]; TOKENS];
    all.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
    let mut factors = [0.0; TOKENS];
    for ((row, scale), factor) in all.iter().zip(scales).zip(&mut factors) {
        // NaN is the largest magnitude as an integer, and makes the token's sums NaN.
        let largest = row.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        *scale = step_of(f32::from_bits(largest));
        *factor = inverse(*scale);
    }
    // Of 8 bytes, the odd ones, which are tile 0's, then the even ones.
    let nibbles =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    for (chunk, tiles) in tiles.chunks_exact_mut(TILES * LINES).enumerate() {
        let mut vectors = [[_mm512_setzero_si512(); TOKENS]; 2];
        for (token, (row, factor)) in all.iter().zip(factors).enumerate() {
            let rest = row.get(chunk * CHUNK..).unwrap_or_default();
            let bytes = to_bytes(&rest[..rest.len().min(CHUNK)], factor);
            let [a, b] = bytes.as_chunks::<64>().0 else { unreachable!("128 bytes") };
            let [a, b] = [load(a), load(b)];
            (vectors[0][token], vectors[1][token]) = if nibbles_first {
                (_mm512_shuffle_epi8(a, nibbles), _mm512_shuffle_epi8(b, nibbles))
            } else {
                (a, b)
            };
        }
        // Lane i of each vector is four bytes of its token; together they are a line.
        for (part, vectors) in vectors.iter().enumerate() {
            for (i, line) in transpose(vectors).into_iter().enumerate() {
                let at =
                    if nibbles_first { i % 2 * LINES + 8 * part + i / 2 } else { part * LINES + i };
                store(&mut tiles[at].0, line);
            }
        }
    }
}
