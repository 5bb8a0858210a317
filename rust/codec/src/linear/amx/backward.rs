//! Sums of `dY W` by strips of W's columns.
//!
//! W is the right factor here: its rows are taken in pairs, 64 columns at a time, and decoded into
//! right-hand tiles, four for 32 rows. A panel of 512 rows stays in L2 for all tokens, and so do
//! the sums until the next panel.

use std::ops::Range;

use half::bf16;

use crate::error::CodecError;
use crate::linear::amx::forward::GROUPS;
use crate::linear::amx::tiles::{Stack, Tiles, LINES, TOKENS};
use crate::linear::amx::transpose::write_interleaved;
use crate::linear::amx::work;
use crate::linear::avx512::decode::{PairDecoder, TileRows};
use crate::linear::backward::{all_scales, copy_columns, Adapter};
use crate::linear::strips::{self, Strip};
use crate::linear::weight::{Codes, Weight};
use crate::parallel;
use crate::scratch::{Line, Scratch};
use crate::simd::Engine;
use crate::values::Element;

/// Columns that are decoded together: the smallest block that has one scale.
const BLOCK: usize = 64;
/// Tiles of a block's columns.
const TILES: usize = BLOCK / TOKENS;
/// Rows of W in a tile.
const DEPTH: usize = 2 * LINES;
/// Tiles of rows in a panel.
const PANEL: usize = 32;

/// Writes `dX = dY W`, and the adapter's part, for 4-bit codes whose chunks have one scale.
///
/// # Errors
/// [`CodecError::Interrupted`].
///
/// # Safety
/// The tiles must have been granted.
pub(crate) unsafe fn backward<T: Element>(
    engine: Engine,
    grad: &[bf16],
    weight: &Weight<'_>,
    adapter: Option<Adapter<'_>>,
    dx: &mut [T],
) -> Result<(), CodecError> {
    let tokens = dx.len() / weight.cols;
    let grad = Packed::new(engine, grad, weight.rows)?;
    let scales = all_scales(engine, weight)?;
    // Each strip reads all of dY; there must be one for each thread.
    let share = weight.cols / parallel::threads(engine);
    let width = share.next_multiple_of(BLOCK).clamp(BLOCK, 4 * BLOCK);
    let work = work(weight, tokens);
    let jobs = strips::split(dx, weight.cols, width).into_iter();
    parallel::for_each(work, engine, jobs, |strip: Strip<'_, T>| {
        let (columns, bodies) = (strip.columns.clone(), engine.bodies);
        let width = columns.len();
        let low_rank = adapter.map(|(g, a, rank)| {
            let mut room = Scratch::<f32>::new(rank * width);
            copy_columns(a, weight.cols, &columns, &mut room);
            (g, room, rank)
        });
        let mut rows = strip.rows.into_iter();
        let mut finish = |first: usize, sums: &mut [f32]| {
            if let Some((g, a, rank)) = &low_rank {
                let g = &g[first * rank..][..sums.len() / width * rank];
                (bodies.floats.nn)(g, a, width, sums, &[]);
            }
            for (sums, row) in sums.chunks_exact(width).zip(&mut rows) {
                (bodies.round)(sums, T::values_mut(row));
            }
        };
        // SAFETY: the caller vouches for the tiles; all such processors have the vectors.
        unsafe { strip_sums(&grad, weight, &scales, columns, tokens, &mut finish) };
    })
}

/// dY in left-hand tiles: for each 32 tokens, for each 32 rows of W, two tiles.
struct Packed {
    tiles: Scratch<Line>,
    depth: usize,
}

impl Packed {
    fn new(engine: Engine, grad: &[bf16], rows: usize) -> Result<Self, CodecError> {
        let tokens = grad.len() / rows;
        let depth = rows.div_ceil(DEPTH);
        let groups = tokens.div_ceil(2 * TOKENS);
        let lines = depth * 2 * LINES;
        let mut tiles = Scratch::new(groups * lines);
        let jobs = tiles.chunks_mut(lines).enumerate();
        parallel::for_each(grad.len(), engine, jobs, |(group, tiles)| {
            let first = group * 2 * TOKENS;
            for token in 0..2 * TOKENS {
                let row = grad.chunks(rows).nth(first + token).unwrap_or_default();
                let mut parts = row.chunks(DEPTH);
                for lines in tiles.chunks_exact_mut(2 * LINES) {
                    let mut line = Line([0; 64]);
                    let values = parts.next().unwrap_or_default();
                    for (to, from) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                        *to = from.to_le_bytes();
                    }
                    lines[token] = line;
                }
            }
        })?;
        Ok(Self { tiles, depth })
    }

    /// The tiles of 32 tokens for some tiles of rows.
    fn group(&self, group: usize, rows: Range<usize>) -> &[Line] {
        let first = group * self.depth;
        &self.tiles[(first + rows.start) * 2 * LINES..(first + rows.end) * 2 * LINES]
    }
}

/// Sums over some columns; `finish` takes the first token and the sums of each 32, (tokens,
/// columns).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn strip_sums(
    grad: &Packed,
    weight: &Weight<'_>,
    scales: &[f32],
    columns: Range<usize>,
    tokens: usize,
    finish: &mut dyn FnMut(usize, &mut [f32]),
) {
    let (width, groups) = (columns.len(), tokens.div_ceil(2 * TOKENS));
    let blocks = width / BLOCK;
    let lines_per_block = PANEL * TILES * LINES;
    let mut panel = Scratch::<Line>::new(blocks * lines_per_block);
    let parts = grad.depth.div_ceil(PANEL);
    let kept = if parts > 1 { groups.min(GROUPS) * blocks * 8 * LINES } else { 0 };
    let mut partial = Scratch::<Line>::new(kept);
    let mut sums = Scratch::<f32>::new(2 * TOKENS * width);
    // SAFETY: the caller vouches for the tiles.
    let tiles = unsafe { Tiles::configure() };
    for (first, part) in (0..groups).step_by(GROUPS).flat_map(|g| (0..parts).map(move |p| (g, p))) {
        let depth = part * PANEL..((part + 1) * PANEL).min(grad.depth);
        if parts > 1 || first == 0 {
            decode_panel(weight, scales, columns.clone(), depth.clone(), &mut panel);
        }
        for group in first..groups.min(first + GROUPS) {
            let left = grad.group(group, depth.clone()).as_chunks::<{ 2 * LINES }>().0;
            for (block, panel) in panel.chunks_exact(lines_per_block).enumerate() {
                let at = ((group - first) * blocks + block) * 8 * LINES;
                let mut last = [Line([0; 64]); 8 * LINES];
                for (half, last) in last.as_chunks_mut::<{ 4 * LINES }>().0.iter_mut().enumerate() {
                    let at = at + half * 4 * LINES;
                    match partial.get(at..).and_then(<[Line]>::first_chunk) {
                        Some(partial) if part > 0 => tiles.load(partial),
                        _ => tiles.zero(),
                    }
                    for (a, b) in left.iter().zip(panel.as_chunks::<{ TILES * LINES }>().0) {
                        let b = [2 * half, 2 * half + 1].map(|tile| Stack::new(&b[tile..], TILES));
                        tiles.multiply_2x2(Stack::dense(a), b);
                    }
                    match partial.get_mut(at..).and_then(<[Line]>::first_chunk_mut) {
                        Some(partial) if part + 1 < parts => tiles.store(partial),
                        _ => tiles.store(last),
                    }
                }
                if part + 1 == parts {
                    write_interleaved(&last, &mut sums, width, block * BLOCK);
                }
            }
            if part + 1 == parts {
                let first = group * 2 * TOKENS;
                finish(first, &mut sums[..(tokens - first).min(2 * TOKENS) * width]);
            }
        }
    }
}

/// Decodes some columns of some tiles of rows: for each 64 columns, for each pair of rows its lines
/// of four tiles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn decode_panel(
    weight: &Weight<'_>,
    all_scales: &[f32],
    columns: Range<usize>,
    depth: Range<usize>,
    panel: &mut [Line],
) {
    let Codes::FourBit { packed, table } = weight.codes else { return };
    let decoder = PairDecoder::new(table);
    let blocks = columns.len() / BLOCK;
    let per_row = weight.cols / weight.blocksize;
    let mut scales = [[0.0; 4]; 2];
    for pair in 0..depth.len() * LINES {
        let row = depth.start * DEPTH + 2 * pair;
        for (i, scales) in scales.iter_mut().enumerate() {
            scales.fill(0.0);
            if row + i < weight.rows {
                let of_row = &all_scales[(row + i) * per_row..][..per_row];
                for (block, scale) in scales.iter_mut().take(blocks).enumerate() {
                    *scale = of_row[(columns.start + block * BLOCK) / weight.blocksize];
                }
            }
        }
        for block in 0..blocks {
            let to = (block * PANEL * LINES + pair) * TILES;
            let at = (columns.start + block * BLOCK) / 2;
            let codes = |row: usize| {
                let codes = packed.get(row * weight.cols / 2 + at..).unwrap_or_default();
                codes.first_chunk::<{ BLOCK / 2 }>().unwrap_or(&[0; BLOCK / 2])
            };
            let scales = [scales[0][block], scales[1][block]];
            let lines = decoder.rows(codes(row), codes(row + 1), scales);
            TileRows::new(&mut panel[to..], TILES, 1).write(0, lines);
        }
    }
}
