//! Sums of `x W^T` by strips of W's rows.
//!
//! Up to 32 tokens, memory sets the speed: a chunk of 64 or 32 rows is decoded into L1 while the
//! tiles multiply the one before. More tokens use what was decoded many times: a panel of up to
//! 256 rows by 1024 columns is decoded into L2, and the sums wait in L2 for the next panel.

use std::ops::Range;

use half::bf16;

use crate::error::CodecError;
use crate::linear::amx::decode::{store_apart, Decoder, Rows, CHUNK, CHUNK_BYTES, TILES_PER_CHUNK};
use crate::linear::amx::pack::{Order, Packed, CHUNK_LINES};
use crate::linear::amx::tiles::{Tiles, LINES, TOKENS};
use crate::linear::amx::transpose::write_transposed;
use crate::linear::amx::work;
use crate::linear::epilogue::Epilogue;
use crate::linear::matvec::scales_avx512::write_scales;
use crate::linear::scratch::{Line, Scratch};
use crate::linear::strips;
use crate::linear::weight::{Codes, Weight};
use crate::parallel;
use crate::simd::{Bodies, Engine};
use crate::values::{Element, ValuesMut};
use crate::x86::prefetch_l2;

/// Tokens that are multiplied while codes are decoded.
pub(super) const FEW: usize = 2 * TOKENS;
/// Chunks of columns in a panel.
const PANEL: usize = 8;
/// Rows of W that are multiplied with 32 tokens at a time.
pub(super) const PAIR: usize = 2 * LINES;

/// Writes `y = x W^T` with what `epilogue` adds.
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The tiles must have been granted.
pub(crate) unsafe fn forward<T: Element>(
    engine: Engine,
    x: &[bf16],
    weight: &Weight<'_>,
    epilogue: &Epilogue<'_>,
    y: &mut [T],
) -> Result<(), CodecError> {
    let tokens = y.len() / weight.rows;
    let nibbles = Nibbles::of(weight);
    let order = if nibbles.is_some() { Order::Nibbles } else { Order::Natural };
    let x = Packed::new(engine, x, weight.cols, order)?;
    // Strips must be many enough for all threads and large enough to use what they read.
    let width = match (tokens > FEW && nibbles.is_some(), weight.rows) {
        (true, 4096..) => 256,
        (true, 1024..) => 128,
        _ => 64,
    };
    let work = work(weight, tokens);
    let jobs = strips::split(y, weight.rows, width).into_iter();
    parallel::for_each(work, engine, jobs, |strip| {
        let (rows, width) = (strip.columns.clone(), strip.columns.len());
        let (epilogue, mut to) = (epilogue.of(rows.clone()), strip.rows.into_iter());
        let mut finish = |first, sums: &mut [f32]| {
            epilogue.finish(first, to.by_ref().take(FEW), sums);
        };
        let product = Product { x: &x, tokens, rows: width, finish: &mut finish };
        match &nibbles {
            // SAFETY: the caller vouches for the tiles; all such processors have the vectors.
            Some(nibbles) => unsafe { of_nibbles(nibbles, rows, product) },
            // SAFETY: as above.
            None => unsafe { of_values(engine.bodies, weight, rows, product) },
        }
    })
}

/// What a strip computes.
struct Product<'a> {
    x: &'a Packed,
    tokens: usize,
    rows: usize,
    /// Takes the first token and the sums, (tokens, rows), of each 32 tokens in turn.
    finish: &'a mut dyn FnMut(usize, &mut [f32]),
}

/// A weight of 4-bit codes whose chunks have one scale in each half.
pub(super) struct Nibbles<'a> {
    pub(super) weight: &'a Weight<'a>,
    pub(super) packed: &'a [u8],
    pub(super) table: &'a [f32; 16],
}

impl<'a> Nibbles<'a> {
    pub(super) fn of(weight: &'a Weight<'a>) -> Option<Self> {
        match weight.codes {
            Codes::FourBit { packed, table } if weight.chunks_have_scales() => {
                Some(Self { weight, packed, table })
            }
            _ => None,
        }
    }

    /// Two scales a chunk for each row: those of its halves, zero after the last column.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn scales(&self, rows: Range<usize>, chunks: usize) -> Scratch<f32> {
        let Weight { scales, blocksize, cols, .. } = *self.weight;
        let blocks = cols / blocksize;
        let halves = blocksize / (CHUNK / 2);
        let mut room = Scratch::<f32>::new(rows.len() * 2 * chunks);
        for (row, room) in rows.zip(room.chunks_exact_mut(2 * chunks)) {
            let (used, rest) = room.split_at_mut(blocks * halves);
            write_scales(&scales, row * blocks, &mut used[..blocks]);
            for half in (0..used.len()).rev().filter(|_| halves > 1) {
                used[half] = used[half / halves];
            }
            rest.fill(0.0);
        }
        room
    }
}

/// Rows of codes of one strip, and what decodes them.
struct Source<'a> {
    decoder: Decoder,
    rows: Rows<'a>,
    /// Whether whole rows are decoded before the next group of rows, or some columns of all.
    whole_rows: bool,
}

impl Source<'_> {
    /// Decodes a chunk of some rows, the rows of a group from `first` on among them, into tiles.
    /// Tile `j` of the group's rows 0 to 15 starts at `j * step`, that of its next 16 rows one tile
    /// later.
    ///
    /// Codes of the next group are fetched from memory: where whole rows are decoded, its lines as
    /// they follow each other, since all will be needed; else those of the same columns.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn decode(&self, rows: Range<usize>, first: usize, chunk: usize, step: usize, to: &mut [Line]) {
        let Rows { codes, bytes_per_row, .. } = self.rows;
        let (start, ahead) = (rows.start, step * bytes_per_row);
        let (line, stride) = if self.whole_rows {
            (chunk * step * CHUNK_BYTES + (start - first) * CHUNK_BYTES, CHUNK_BYTES)
        } else {
            ((start - first) * bytes_per_row + chunk * CHUNK_BYTES, bytes_per_row)
        };
        let next = first * bytes_per_row + ahead + line;
        let to = &mut to[start - first..];
        self.rows.for_each(rows, chunk, |i, row, scales| {
            prefetch_l2(codes, next + i * stride);
            store_apart(&mut to[i..], step, self.decoder.row(row, scales));
        });
    }
}

/// Sums over a strip of codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn of_nibbles(nibbles: &Nibbles<'_>, rows: Range<usize>, product: Product<'_>) {
    let bytes_per_row = nibbles.weight.cols / 2;
    let scales = nibbles.scales(rows.clone(), product.x.chunks);
    let codes = Source {
        decoder: Decoder::new(nibbles.table),
        rows: Rows {
            codes: &nibbles.packed[rows.start * bytes_per_row..],
            bytes_per_row,
            numbers: &scales,
            chunks: product.x.chunks,
            count: rows.len(),
        },
        whole_rows: product.tokens <= FEW,
    };
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    if product.tokens <= TOKENS {
        few_tokens::<4>(&tiles, &codes, product);
    } else if product.tokens <= FEW {
        few_tokens::<2>(&tiles, &codes, product);
    } else {
        many_tokens(&tiles, product, PANEL, |chunks, panel| {
            let lines = chunks.len() * 2 * CHUNK_LINES;
            for (pair, panel) in panel.chunks_exact_mut(lines).enumerate() {
                for (chunk, to) in chunks.clone().zip(panel.chunks_exact_mut(2 * CHUNK_LINES)) {
                    codes.decode(pair * PAIR..(pair + 1) * PAIR, pair * PAIR, chunk, PAIR, to);
                }
            }
        });
    }
}

/// Sums over a strip of any weight, dequantized first.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn of_values(
    bodies: &'static Bodies,
    weight: &Weight<'_>,
    rows: Range<usize>,
    product: Product<'_>,
) {
    let mut values = vec![bf16::ZERO; rows.len() * weight.cols];
    weight.dequantize_rows(bodies, rows, ValuesMut::Bf16(&mut values));
    let chunks = product.x.chunks;
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    many_tokens(&tiles, product, chunks, |chunks, panel| {
        let pairs = panel.chunks_exact_mut(chunks.len() * 2 * CHUNK_LINES);
        for (panel, rows) in pairs.zip(values.chunks(PAIR * weight.cols)) {
            for (row, values) in rows.chunks(weight.cols).enumerate() {
                for (tile, values) in values.chunks(2 * LINES).enumerate() {
                    let mut line = Line([0; 64]);
                    for (to, from) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                        *to = from.to_le_bytes();
                    }
                    panel[tile * PAIR + row] = line;
                }
                for tile in weight.cols.div_ceil(2 * LINES)..chunks.len() * TILES_PER_CHUNK {
                    panel[tile * PAIR + row] = Line([0; 64]);
                }
            }
        }
    });
}

/// Decodes a chunk while the one before is multiplied: `ROW_TILES` tiles of rows with as many
/// tokens as four accumulators hold.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn few_tokens<const ROW_TILES: usize>(tiles: &Tiles, codes: &Source<'_>, product: Product<'_>) {
    let Product { x, tokens, rows, finish } = product;
    let mut sums = Scratch::<f32>::new(tokens * rows);
    let (step, height) = (ROW_TILES * LINES, ROW_TILES * LINES);
    let mut room = Scratch::<Line>::new(2 * TILES_PER_CHUNK * step);
    let (mut next, mut ready) = room.split_at_mut(TILES_PER_CHUNK * step);
    let mut accumulators = [Line([0; 64]); 4 * LINES];
    for first in (0..rows).step_by(height) {
        tiles.zero();
        for chunk in 0..=x.chunks {
            for tile in 0..TILES_PER_CHUNK {
                if chunk < x.chunks {
                    let quarter = first + tile * height / 4..first + (tile + 1) * height / 4;
                    codes.decode(quarter, first, chunk, step, next);
                }
                if chunk > 0 {
                    let at = ((chunk - 1) * TILES_PER_CHUNK + tile) * LINES;
                    let pairs = |group: usize| lines::<LINES>(&x.group(group)[at..]);
                    let a = &ready[tile * step..];
                    if ROW_TILES == 4 {
                        tiles.multiply_4x1(lines(a), pairs(0));
                    } else {
                        tiles.multiply_2x2(lines(a), pairs(0), pairs(1));
                    }
                }
            }
            std::mem::swap(&mut next, &mut ready);
        }
        tiles.store(&mut accumulators);
        for (i, tile) in accumulators.as_chunks::<LINES>().0.iter().enumerate() {
            let (row, token) = if ROW_TILES == 4 { (i, 0) } else { (i / 2, i % 2) };
            let (column, token) = (first + row * LINES, token * TOKENS);
            if column < rows && token < tokens {
                write_transposed(tile, &mut sums, rows, token, column);
            }
        }
    }
    finish(0, &mut sums);
}

/// Multiplies panels of decoded rows with all tokens. `decode` writes a panel: for each 32 rows,
/// for each chunk of the range, four times two tiles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn many_tokens(
    tiles: &Tiles,
    product: Product<'_>,
    panel_chunks: usize,
    mut decode: impl FnMut(Range<usize>, &mut [Line]),
) {
    let Product { x, tokens, rows, finish } = product;
    let mut sums = Scratch::<f32>::new(FEW * rows);
    let (pairs, groups) = (rows.div_ceil(PAIR), tokens.div_ceil(2 * TOKENS));
    let mut panel = Scratch::<Line>::new(pairs * panel_chunks.min(x.chunks) * 2 * CHUNK_LINES);
    let parts = x.chunks.div_ceil(panel_chunks);
    let mut partial = Scratch::<Line>::new(if parts > 1 { pairs * groups * 4 * LINES } else { 0 });
    let mut last = [Line([0; 64]); 4 * LINES];
    for part in 0..parts {
        let chunks = part * panel_chunks..((part + 1) * panel_chunks).min(x.chunks);
        let lines_per_pair = chunks.len() * 2 * CHUNK_LINES;
        let panel = &mut panel[..pairs * lines_per_pair];
        decode(chunks.clone(), panel);
        for group in 0..groups {
            let columns = chunks.start * CHUNK_LINES..chunks.end * CHUNK_LINES;
            let [b0, b1] = [0, 1].map(|i| &x.group(2 * group + i)[columns.clone()]);
            let here = (tokens - group * FEW).min(FEW);
            let sums = &mut sums[..here * rows];
            for (pair, panel) in panel.chunks_exact(lines_per_pair).enumerate() {
                let at = (group * pairs + pair) * 4 * LINES;
                if part == 0 {
                    tiles.zero();
                } else {
                    tiles.load(lines(&partial[at..]));
                }
                let steps = panel.as_chunks::<{ 2 * LINES }>().0.iter();
                let right = b0.as_chunks::<LINES>().0.iter().zip(b1.as_chunks::<LINES>().0);
                for (a, (b0, b1)) in steps.zip(right) {
                    tiles.multiply_2x2(a, b0, b1);
                }
                if part + 1 < parts {
                    tiles.store(lines_mut(&mut partial[at..]));
                    continue;
                }
                tiles.store(&mut last);
                for (i, tile) in last.as_chunks::<LINES>().0.iter().enumerate() {
                    let (column, token) = (pair * PAIR + i / 2 * LINES, i % 2 * TOKENS);
                    if column < rows && token < here {
                        write_transposed(tile, sums, rows, token, column);
                    }
                }
            }
            if part + 1 == parts {
                finish(group * FEW, sums);
            }
        }
    }
}

/// The first `N` lines.
#[inline(always)]
pub(super) fn lines<const N: usize>(from: &[Line]) -> &[Line; N] {
    from.first_chunk().expect("the scratch was made for them")
}

/// The first `N` lines, to write.
#[inline(always)]
fn lines_mut<const N: usize>(from: &mut [Line]) -> &mut [Line; N] {
    from.first_chunk_mut().expect("the scratch was made for them")
}
