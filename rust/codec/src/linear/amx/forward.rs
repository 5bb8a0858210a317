//! Sums of `x W^T` by strips of W's rows.
//!
//! Up to 32 tokens, memory sets the speed: a chunk of 64 or 32 rows is decoded into L1 while the
//! tiles multiply the one before. More tokens use what was decoded many times: a panel of up to
//! 256 rows by 1024 columns is decoded into L2, and the sums wait in L2 for the next panel.

use std::ops::Range;

use half::bf16;

use crate::error::CodecError;
use crate::linear::amx::pack::{Order, Packed, CHUNK_LINES};
use crate::linear::amx::tiles::{Stack, Tiles, LINES, TOKENS};
use crate::linear::amx::transpose::write_transposed;
use crate::linear::amx::work;
use crate::linear::avx512::decode::{Decoder, Rows, TileRows, CHUNK_BYTES, TILES_PER_CHUNK};
use crate::linear::avx512::nibbles::Nibbles;
use crate::linear::epilogue::Epilogue;
use crate::linear::strips;
use crate::linear::weight::Weight;
use crate::parallel::{self, threads};
use crate::scratch::{Line, Scratch};
use crate::simd::{Bodies, Engine};
use crate::values::{Element, ValuesMut};
use crate::x86::prefetch_l2;

/// Tokens that are multiplied while codes are decoded.
pub(super) const FEW: usize = 2 * TOKENS;
/// Chunks of columns in a panel.
const PANEL: usize = 8;
/// Groups of 32 tokens whose sums stay in L2, between panels of 512 rows.
pub(super) const GROUPS: usize = 16;
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
    let width = if nibbles.is_some() { width(engine, weight.rows, tokens) } else { 64 };
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

/// Rows of a strip of 4-bit codes: strips must be many enough for all threads.
///
/// With few tokens the rows behind those that are multiplied are fetched from memory, so most of
/// them should be this thread's. With many, each strip reads all of x.
pub(super) fn width(engine: Engine, rows: usize, tokens: usize) -> usize {
    let (strips, most) = if tokens > FEW { (1, 256) } else { (4, 512) };
    (rows / (strips * threads(engine))).next_multiple_of(64).clamp(64, most)
}

/// What a strip computes.
struct Product<'a> {
    x: &'a Packed,
    tokens: usize,
    rows: usize,
    /// Takes the first token and the sums, (tokens, rows), of each 32 tokens in turn.
    finish: &'a mut dyn FnMut(usize, &mut [f32]),
}

/// Rows of codes of one strip, and what decodes them.
struct Source<'a> {
    decoder: Decoder,
    rows: Rows<'a>,
}

impl<'a> Source<'a> {
    /// Rows of the weight, with their scales.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(nibbles: &Nibbles<'a>, rows: Range<usize>, chunks: usize, scales: &'a [f32]) -> Self {
        let bytes_per_row = nibbles.weight.cols / 2;
        let codes = &nibbles.packed[rows.start * bytes_per_row..];
        let rows = Rows { codes, bytes_per_row, numbers: scales, chunks, count: rows.len() };
        Self { decoder: Decoder::new(nibbles.table), rows }
    }

    /// Decodes a chunk of some rows into lines of tiles, `step` from row to row. Meanwhile lines of
    /// codes are fetched from memory, each `stride` bytes after the one before, from `ahead` on.
    #[inline(always)]
    fn decode(
        &self,
        rows: Range<usize>,
        chunk: usize,
        (ahead, stride): (usize, usize),
        (to, step): (&mut [Line], usize),
    ) {
        let mut to = TileRows::new(to, step, rows.len());
        self.rows.for_each(rows, chunk, |i, row, scales| {
            prefetch_l2(self.rows.codes, ahead + i * stride);
            // SAFETY: all processors with tiles have the vectors.
            let lines = unsafe { self.decoder.row(row, scales) };
            // SAFETY: as above.
            unsafe { to.write(i, lines) };
        });
    }
}

/// Sums over a strip of codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn of_nibbles(nibbles: &Nibbles<'_>, rows: Range<usize>, product: Product<'_>) {
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    if product.tokens <= TOKENS {
        return few_tokens::<4>(&tiles, nibbles, rows, product);
    }
    if product.tokens <= FEW {
        return few_tokens::<2>(&tiles, nibbles, rows, product);
    }
    let chunks = product.x.chunks;
    let scales = nibbles.scales(rows.clone(), chunks);
    let source = Source::new(nibbles, rows, chunks, &scales);
    let bytes_per_row = source.rows.bytes_per_row;
    many_tokens(&tiles, product, PANEL, |chunks, panel| {
        let lines = chunks.len() * 2 * CHUNK_LINES;
        for (pair, panel) in panel.chunks_exact_mut(lines).enumerate() {
            let rows = pair * PAIR..(pair + 1) * PAIR;
            for (chunk, to) in chunks.clone().zip(panel.chunks_exact_mut(2 * CHUNK_LINES)) {
                // The next rows of these columns.
                let ahead = rows.end * bytes_per_row + chunk * CHUNK_BYTES;
                let to = (to, TILES_PER_CHUNK);
                source.decode(rows.clone(), chunk, (ahead, bytes_per_row), to);
            }
        }
    });
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
                let chunks = panel.chunks_exact_mut(2 * CHUNK_LINES);
                let lines =
                    chunks.flat_map(|chunk| &mut chunk[row * TILES_PER_CHUNK..][..TILES_PER_CHUNK]);
                let mut parts = values.chunks(2 * LINES);
                for line in lines {
                    *line = Line([0; 64]);
                    let part = parts.next().unwrap_or_default();
                    for (to, from) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(part) {
                        *to = from.to_le_bytes();
                    }
                }
            }
        }
    });
}

/// Decodes a chunk while the one before is multiplied: `ROW_TILES` tiles of rows with as many
/// tokens as four accumulators hold.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn few_tokens<const ROW_TILES: usize>(
    tiles: &Tiles,
    nibbles: &Nibbles<'_>,
    strip: Range<usize>,
    product: Product<'_>,
) {
    /// Lines from row to row: those of two chunks side by side, the one that is decoded and the one
    /// that is multiplied. A load waits for earlier stores whose addresses agree with its own in
    /// the low 12 bits: those of the two chunks never do.
    const STEP: usize = 2 * TILES_PER_CHUNK;
    let Product { x, tokens, rows, finish } = product;
    let mut sums = Scratch::<f32>::new(tokens * rows);
    let height = ROW_TILES * LINES;
    let quarter = height / TILES_PER_CHUNK;
    let mut room = Scratch::<Line>::new(height * STEP);
    for first in (0..rows).step_by(height) {
        let group = strip.start + first..strip.end.min(strip.start + first + height);
        let scales = nibbles.scales(group.clone(), x.chunks);
        let codes = Source::new(nibbles, group, x.chunks, &scales);
        // The codes of the next group, line by line.
        let next_group = height * codes.rows.bytes_per_row;
        tiles.zero();
        for chunk in 0..=x.chunks {
            let [next, ready] = [chunk, chunk + 1].map(|chunk| chunk % 2 * TILES_PER_CHUNK);
            for tile in 0..TILES_PER_CHUNK {
                if chunk < x.chunks {
                    let row = tile * quarter;
                    let ahead = next_group + (chunk * height + row) * CHUNK_BYTES;
                    let to = (&mut room[row * STEP + next..], STEP);
                    codes.decode(row..row + quarter, chunk, (ahead, CHUNK_BYTES), to);
                }
                if chunk > 0 {
                    let at = ((chunk - 1) * TILES_PER_CHUNK + tile) * LINES;
                    let pairs = |group: usize| Stack::dense(&x.group(group)[at..]);
                    let a = Stack::new(&room[ready + tile..], STEP);
                    if ROW_TILES == 4 {
                        tiles.multiply_4x1(a, pairs(0));
                    } else {
                        tiles.multiply_2x2(a, [pairs(0), pairs(1)]);
                    }
                }
            }
        }
        let mut accumulators = [Line([0; 64]); 4 * LINES];
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
/// for each chunk of the range, for each row its lines of four tiles.
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
    let kept = if parts > 1 { pairs * groups.min(GROUPS) * 4 * LINES } else { 0 };
    let mut partial = Scratch::<Line>::new(kept);
    let mut last = [Line([0; 64]); 4 * LINES];
    for (first, part) in (0..groups).step_by(GROUPS).flat_map(|g| (0..parts).map(move |p| (g, p))) {
        let chunks = part * panel_chunks..((part + 1) * panel_chunks).min(x.chunks);
        let lines_per_pair = chunks.len() * 2 * CHUNK_LINES;
        let panel = &mut panel[..pairs * lines_per_pair];
        if parts > 1 || first == 0 {
            decode(chunks.clone(), panel);
        }
        for group in first..groups.min(first + GROUPS) {
            let columns = chunks.start * CHUNK_LINES..chunks.end * CHUNK_LINES;
            let [b0, b1] = [0, 1].map(|i| &x.group(2 * group + i)[columns.clone()]);
            let here = (tokens - group * FEW).min(FEW);
            let sums = &mut sums[..here * rows];
            for (pair, panel) in panel.chunks_exact(lines_per_pair).enumerate() {
                let at = ((group - first) * pairs + pair) * 4 * LINES;
                if part == 0 {
                    tiles.zero();
                } else {
                    tiles.load(lines(&partial[at..]));
                }
                let right = b0.as_chunks::<LINES>().0.iter().zip(b1.as_chunks::<LINES>().0);
                for (i, (b0, b1)) in right.enumerate() {
                    let at = i / TILES_PER_CHUNK * 2 * CHUNK_LINES + i % TILES_PER_CHUNK;
                    let a = Stack::new(&panel[at..], TILES_PER_CHUNK);
                    tiles.multiply_2x2(a, [b0, b1].map(|b| Stack::dense(b)));
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
