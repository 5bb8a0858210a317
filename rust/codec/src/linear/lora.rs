//! Products with the thin matrices of an adapter, and its gradients.
//!
//! ```text
//! h = scaling * x A^T      (M, r)        dA = G^T x     (r, K)
//! G = scaling * dY B       (M, r)        dB = dY^T h    (N, r)
//! ```
//!
//! x and dY are widened piece by piece. A thread owns tokens of h and G and columns of the
//! gradients, so that every sum runs over its terms in one order.

use std::ops::Range;

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::layout::check_len;
use crate::linear::adapter::{Factors, Floats, Lora};
use crate::linear::dense::tokens::turn;
use crate::parallel;
use crate::scratch::Scratch;
use crate::simd::{Bodies, Engine};
use crate::values::Values;

/// Tokens that a thread takes at a time in `h` and `G`: whole tiles of the AVX-512 body.
const TOKENS: usize = 2 * 14;

/// Features of a piece that is widened at a time for `h` and `G`.
const FEATURES: usize = 464;

/// Tokens up to which the matrices are taken as they lie: turning them would cost more.
pub(crate) const FEW: usize = 8;

/// Tokens from which tiles are faster: they want both factors packed.
const MIN_TILES: usize = 32;

/// Columns of a gradient that a thread takes at a time, and tokens of the piece it widens.
const PIECE: (usize, usize) = (256, 112);

/// Writes the gradients of an adapter, `da` like A and `db` like B, in fp32.
///
/// `x` is (M, K), `grad`, the gradient of the layer's output, (M, N).
///
/// # Errors
/// [`CodecError::Length`] and [`CodecError::Interrupted`].
pub fn lora_gradients(
    engine: Engine,
    x: Values<'_>,
    grad: Values<'_>,
    lora: Lora<'_>,
    da: Option<&mut [f32]>,
    db: Option<&mut [f32]>,
) -> Result<(), CodecError> {
    let Lora { a, b, rank, scaling } = lora;
    let of = |len: usize| len.checked_div(rank).unwrap_or(0);
    let (cols, rows) = (of(a.len()), of(b.len()));
    check_len("lora_A", a.len(), rank * cols, (cols, "features"))?;
    check_len("lora_B", b.len(), rank * rows, (rows, "features"))?;
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    if rank > 0 {
        check_len("x", x.len(), tokens * cols, (tokens, "tokens"))?;
        check_len("grad", grad.len(), tokens * rows, (tokens, "tokens"))?;
    }
    let lora = lora.factors(engine.bodies);
    if let Some(da) = da {
        check_len("grad_A", da.len(), a.len(), (cols, "features"))?;
        let g = thin(engine, grad, &lora.b, rank, scaling)?;
        let (turned, strip_width) = gradient(engine, x, &g, rank, cols)?;
        for (strip, part) in turned.chunks(strip_width * rank.max(1)).enumerate() {
            let width = part.len() / rank;
            for (row, from) in part.chunks_exact(width).enumerate() {
                da[row * cols + strip * strip_width..][..width].copy_from_slice(from);
            }
        }
    }
    if let Some(db) = db {
        check_len("grad_B", db.len(), b.len(), (rows, "features"))?;
        let h = down(engine, x, &lora)?;
        let (turned, width) = gradient(engine, grad, &h, rank, rows)?;
        let strip = width * rank.max(1);
        let strips = turned.chunks(strip).zip(db.chunks_mut(strip));
        for (from, to) in strips {
            let width = from.len() / rank;
            turn(engine.bodies, (from, width), (to, rank), (rank, width));
        }
    }
    Ok(())
}

/// `h = scaling * x A^T`.
pub(crate) fn down(
    engine: Engine,
    x: Values<'_>,
    lora: &Factors<'_>,
) -> Result<Vec<f32>, CodecError> {
    let Factors { ref a, rank, scaling, .. } = *lora;
    let cols = a.len().checked_div(rank).unwrap_or(0);
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    if tokens <= FEW {
        let mut sums = vec![0.0; tokens * rank];
        in_default_float_env(|| {
            (engine.bodies.floats.nt)(&Floats::new(engine.bodies, x), a, cols, &mut sums);
            for sum in &mut sums {
                *sum *= scaling;
            }
        });
        return Ok(sums);
    }
    let mut turned = vec![0.0; a.len()];
    turn(engine.bodies, (a, cols), (&mut turned, rank), (rank, cols));
    thin(engine, x, &turned, rank, scaling)
}

/// `scaling * x w`, (M, features) by (features, rank).
pub(crate) fn thin(
    engine: Engine,
    x: Values<'_>,
    w: &[f32],
    rank: usize,
    scaling: f32,
) -> Result<Vec<f32>, CodecError> {
    let features = w.len().checked_div(rank).unwrap_or(0);
    let count = x.len().checked_div(features).unwrap_or(0);
    if let (Values::Bf16(x), Some(tiles), MIN_TILES..) = (x, engine.bodies.tiles, count) {
        return (tiles.thin)(engine, x, w, rank, scaling);
    }
    let mut sums = vec![0.0; count * rank];
    let work = x.len().saturating_mul(rank.div_ceil(16));
    let jobs = sums.chunks_mut(TOKENS * rank.max(1)).enumerate();
    parallel::for_each(work, engine, jobs, |(job, sums)| {
        let tokens = job * TOKENS..job * TOKENS + sums.len() / rank;
        let mut room = Scratch::new(TOKENS * FEATURES);
        for start in (0..features).step_by(FEATURES) {
            let columns = start..(start + FEATURES).min(features);
            let piece = piece(engine.bodies, x, features, tokens.clone(), &columns, &mut room);
            let w = &w[columns.start * rank..columns.end * rank];
            (engine.bodies.floats.nn)(piece, w, rank, sums, &[]);
        }
        for sum in sums {
            *sum *= scaling;
        }
    })?;
    Ok(sums)
}

/// `g^T x`, (rank, M) by (M, features), by strips of columns, (rank, strip), and their width.
fn gradient(
    engine: Engine,
    x: Values<'_>,
    g: &[f32],
    rank: usize,
    features: usize,
) -> Result<(Vec<f32>, usize), CodecError> {
    let (width, height) = PIECE;
    let count = g.len().checked_div(rank).unwrap_or(0);
    if let (Values::Bf16(x), Some(tiles), MIN_TILES..) = (x, engine.bodies.tiles, count) {
        return (tiles.gradient)(engine, x, g, rank, features);
    }
    let mut turned = vec![0.0; g.len()];
    let parts = turned.chunks_mut(height * rank.max(1)).zip(g.chunks(height * rank.max(1)));
    for (to, from) in parts {
        let tokens = from.len() / rank;
        turn(engine.bodies, (from, rank), (to, tokens), (tokens, rank));
    }
    let mut sums = vec![0.0; rank * features];
    let work = x.len().saturating_mul(rank.div_ceil(16));
    let jobs = sums.chunks_mut(width * rank.max(1)).enumerate();
    parallel::for_each(work, engine, jobs, |(job, sums)| {
        let columns = job * width..job * width + sums.len() / rank;
        let mut room = Scratch::new(width * height);
        for (start, g) in (0..count).step_by(height).zip(turned.chunks(height * rank)) {
            let tokens = start..(start + height).min(count);
            let piece = piece(engine.bodies, x, features, tokens, &columns, &mut room);
            (engine.bodies.floats.nn)(g, piece, columns.len(), sums, &[]);
        }
    })?;
    Ok((sums, width))
}

/// Some columns of some tokens, as floats.
fn piece<'a>(
    bodies: &'static Bodies,
    x: Values<'_>,
    cols: usize,
    tokens: Range<usize>,
    columns: &Range<usize>,
    room: &'a mut [f32],
) -> &'a [f32] {
    let room = &mut room[..tokens.len() * columns.len()];
    for (token, row) in tokens.zip(room.chunks_exact_mut(columns.len())) {
        (bodies.widen)(x.range(token * cols + columns.start..token * cols + columns.end), row);
    }
    room
}
