//! The left-hand side of a layer, packed as right-hand tiles.

use std::arch::x86_64::*;

use half::bf16;

use crate::error::CodecError;
use crate::linear::amx::tiles::{LINES, TOKENS};
use crate::linear::amx::transpose::transpose;
use crate::linear::avx512::decode::{CHUNK, TILES_PER_CHUNK};
use crate::parallel;
use crate::scratch::{Line, Scratch};
use crate::simd::Engine;
use crate::x86::avx512::{load, store};

/// Which columns of a chunk of 128 a tile holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As nibbles come out of their bytes: every fourth one.
    Nibbles,
    /// One after the other.
    Natural,
}

#[cfg(test)]
impl Order {
    /// The column, in its chunk, of value `i` of tile `tile`.
    pub(crate) const fn column(self, tile: usize, i: usize) -> usize {
        match self {
            Self::Nibbles => 4 * i + (tile ^ 1),
            Self::Natural => 32 * tile + i,
        }
    }
}

/// Tokens in tiles: for each 16 tokens, for each chunk of 128 columns, four tiles.
pub(crate) struct Packed {
    pub(crate) tiles: Scratch<Line>,
    /// Chunks of columns.
    pub(crate) chunks: usize,
}

/// Lines of a chunk of 16 tokens.
pub(crate) const CHUNK_LINES: usize = TILES_PER_CHUNK * LINES;

/// Groups of 16 tokens: pairs of them, but only one where few tokens meet 4-bit codes.
pub(crate) fn groups(tokens: usize, nibbles: bool) -> usize {
    if nibbles && tokens <= TOKENS {
        1
    } else {
        tokens.div_ceil(2 * TOKENS) * 2
    }
}

impl Packed {
    /// Packs (tokens, cols) values; columns to the end of the last chunk, and tokens to whole
    /// [`groups`], are zero.
    pub(crate) fn new(
        engine: Engine,
        x: &[bf16],
        cols: usize,
        order: Order,
    ) -> Result<Self, CodecError> {
        let tokens = x.len() / cols;
        let chunks = cols.div_ceil(CHUNK);
        let groups = groups(tokens, order == Order::Nibbles);
        let mut tiles = Scratch::new(groups * chunks * CHUNK_LINES);
        let jobs = tiles.chunks_mut(chunks * CHUNK_LINES).enumerate();
        parallel::for_each(x.len(), engine, jobs, |(group, tiles)| {
            let rows = x.chunks(cols).skip(group * TOKENS).take(TOKENS);
            // SAFETY: all processors with tiles have the vectors.
            unsafe { pack_group(rows, chunks, order, tiles) };
        })?;
        Ok(Self { tiles, chunks })
    }

    /// The tiles of 16 tokens.
    pub(crate) fn group(&self, group: usize) -> &[Line] {
        let lines = self.chunks * CHUNK_LINES;
        &self.tiles[group * lines..(group + 1) * lines]
    }
}

/// Packs up to 16 rows; the tokens after them are zero.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_group<'a>(
    rows: impl Iterator<Item = &'a [bf16]>,
    chunks: usize,
    order: Order,
    tiles: &mut [Line],
) {
    let mut all = [&[][..]; TOKENS];
    all.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
    // Of 8 values, those of tile 0, which are 1 and 5, those of tile 1, 0 and 4, and so on.
    let nibbles =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
    for (chunk, tiles) in tiles.chunks_exact_mut(CHUNK_LINES).enumerate().take(chunks) {
        for part in 0..TILES_PER_CHUNK {
            let vectors = core::array::from_fn(|token| {
                let values = load_or_zero(all[token], chunk * CHUNK + part * 32);
                match order {
                    Order::Nibbles => _mm512_shuffle_epi8(values, nibbles),
                    Order::Natural => values,
                }
            });
            // Lane i of each vector is a pair of its token; together they are a line.
            for (i, line) in transpose(&vectors).into_iter().enumerate() {
                let (tile, pair) = match order {
                    Order::Nibbles => (i % 4, 4 * part + i / 4),
                    Order::Natural => (part, i),
                };
                store(&mut tiles[tile * LINES + pair].0, line);
            }
        }
    }
}

/// 32 values from `at` on; zero after the last.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_or_zero(row: &[bf16], at: usize) -> __m512i {
    let rest = row.get(at..).unwrap_or_default();
    if let Some(values) = rest.first_chunk::<32>() {
        return load(values);
    }
    let mut room = [bf16::ZERO; 32];
    room[..rest.len()].copy_from_slice(rest);
    load(&room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::available;

    #[test]
    fn every_value_has_its_place_and_the_rest_is_zero() {
        for (tokens, cols) in [(1, 64), (16, 128), (17, 192), (40, 576)] {
            let value = |token: usize, column: usize| (token * 7 + column) as f32 % 251.0 + 1.0;
            let x: Vec<bf16> =
                (0..tokens * cols).map(|i| bf16::from_f32(value(i / cols, i % cols))).collect();
            for order in [Order::Nibbles, Order::Natural] {
                let engine = Engine::new(available()[0], 1);
                let packed = Packed::new(engine, &x, cols, order).unwrap();
                assert_eq!(packed.chunks, cols.div_ceil(CHUNK));
                for (i, line) in packed.tiles.iter().enumerate() {
                    let (tile, pair) = (i / LINES, i % LINES);
                    let (group, tile) = (tile / packed.chunks / 4, tile % (packed.chunks * 4));
                    for (j, bytes) in line.0.as_chunks::<2>().0.iter().enumerate() {
                        let token = group * TOKENS + j / 2;
                        let place = order.column(tile % 4, 2 * pair + j % 2);
                        let column = tile / 4 * CHUNK + place;
                        let found = bf16::from_le_bytes(*bytes).to_f32();
                        let inside = token < tokens && column < cols;
                        let rounded = bf16::from_f32(value(token, column)).to_f32();
                        assert_eq!(found, if inside { rounded } else { 0.0 });
                    }
                }
            }
        }
    }
}
