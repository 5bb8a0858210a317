//! `nt`: tiles of dot products along k, up to 24 in registers.

use std::arch::x86_64::*;

use crate::linear::dense::avx512::lanes::Lanes;
use crate::linear::dense::avx512::{load, mask, LANES};

/// `sums += x w^T`, (m, k) by (n, k).
///
/// Groups of up to 8 rows of x meet as many rows of w as registers allow, so that each row of w
/// is fetched once a group.
///
/// # Safety
/// The machine must have the instruction of the lanes.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn nt<L: Lanes>(x: &[L::Right], w: &[L::Left], k: usize, sums: &mut [L::Sum]) {
    if k == 0 || w.is_empty() {
        return;
    }
    let (m, n) = (x.len() / k, w.len() / k);
    assert!(w.len() == n * k && x.len() == m * k && sums.len() == m * n);
    let groups = m.div_ceil(8);
    for group in 0..groups {
        let rows = group * m / groups..(group + 1) * m / groups;
        let (x, sums) = (&x[rows.start * k..], &mut sums[rows.start * n..]);
        match rows.len() {
            // SAFETY: so many rows of x and sums follow; w is n rows.
            1 => unsafe { dots::<L, 1, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            2 => unsafe { dots::<L, 2, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            3 => unsafe { dots::<L, 3, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            4 => unsafe { dots::<L, 4, 6>(x, w, k, sums, n) },
            // SAFETY: as above.
            5 => unsafe { dots::<L, 5, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            6 => unsafe { dots::<L, 6, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            7 => unsafe { dots::<L, 7, 3>(x, w, k, sums, n) },
            // SAFETY: as above.
            _ => unsafe { dots::<L, 8, 3>(x, w, k, sums, n) },
        }
    }
}

/// `M` rows of x with all rows of w, `N` at a time.
///
/// # Safety
/// `x` must have `M` rows of `k` values, `w` `n` of them, `sums` `M` rows of `n`.
#[target_feature(enable = "avx512f")]
unsafe fn dots<L: Lanes, const M: usize, const N: usize>(
    x: &[L::Right],
    w: &[L::Left],
    k: usize,
    sums: &mut [L::Sum],
    n: usize,
) {
    let whole = n / N * N;
    for j in (0..whole).step_by(N) {
        // SAFETY: rows j..j + N of w are there.
        unsafe { tile_of_dots::<L, M, N>(x, &w[j * k..], k, &mut sums[j..], n) };
    }
    for j in whole..n {
        // SAFETY: row j of w is there.
        unsafe { tile_of_dots::<L, M, 1>(x, &w[j * k..], k, &mut sums[j..], n) };
    }
}

/// # Safety
/// `x` must have `M` rows of `k` values, `w` `N` of them, `sums` `M` rows of `N` values at
/// distances of `n`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile_of_dots<L: Lanes, const M: usize, const N: usize>(
    x: &[L::Right],
    w: &[L::Left],
    k: usize,
    sums: &mut [L::Sum],
    n: usize,
) {
    let (x, w) = (x.as_ptr().cast(), w.as_ptr().cast());
    let mut tile = [[_mm512_setzero_ps(); N]; M];
    let whole = k / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        // SAFETY: at..at + 16 lies within each row.
        unsafe { step::<L, M, N>(x, w, k, at, u16::MAX, &mut tile) };
    }
    if whole < k {
        // SAFETY: the mask is what is left of each row.
        unsafe { step::<L, M, N>(x, w, k, whole, mask(k - whole), &mut tile) };
    }
    let mut flat = [L::ZERO; 24];
    for (vectors, sums) in tile.as_flattened().chunks(LANES).zip(flat.chunks_mut(LANES)) {
        let mut sixteen = [_mm512_setzero_ps(); LANES];
        sixteen[..vectors.len()].copy_from_slice(vectors);
        // SAFETY: as the caller says of the instruction.
        let all = unsafe { sum_of_each::<L>(&sixteen) };
        let to = sums.as_mut_ptr().cast();
        // SAFETY: the mask is the length of the chunk, of 8 or 16 lanes.
        unsafe { _mm512_mask_storeu_ps(to, mask(sums.len()), all) };
    }
    for (r, tile) in flat.chunks(N).take(M).enumerate() {
        sums[r * n..r * n + N].iter_mut().zip(tile).for_each(|(sum, dot)| *sum += *dot);
    }
}

/// Adds the products of 16 values of each row, or of those in `lanes`.
///
/// # Safety
/// These values must be in every row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step<L: Lanes, const M: usize, const N: usize>(
    x: *const f32,
    w: *const f32,
    k: usize,
    at: usize,
    lanes: u16,
    tile: &mut [[__m512; N]; M],
) {
    let mut rows = [_mm512_setzero_ps(); N];
    for (j, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *row = unsafe { load(w, j * k + at, lanes) };
    }
    for (i, tile) in tile.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { load(x, i * k + at, lanes) };
        for (sum, row) in tile.iter_mut().zip(rows) {
            // SAFETY: as the caller says of the instruction.
            unsafe { L::add(x, row, sum) };
        }
    }
}

/// Lane `i` of the result is the sum of vector `i`.
///
/// # Safety
/// As [`Lanes::join`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sum_of_each<L: Lanes>(vectors: &[__m512; 16]) -> __m512 {
    // Halve 16 vectors to 8, 4, 2, 1: each step pairs two vectors, half the lanes from each.
    let halves: [__m512; 8] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        // SAFETY: passed on.
        unsafe { L::join(low, high) }
    });
    let quarters: [__m512; 4] = core::array::from_fn(|i| {
        let (a, b) = (_mm512_castps_pd(halves[2 * i]), _mm512_castps_pd(halves[2 * i + 1]));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        let (low, high) = (_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        // SAFETY: passed on.
        unsafe { L::join(low, high) }
    });
    let eighths: [__m512; 2] = core::array::from_fn(|i| {
        // SAFETY: passed on.
        unsafe { sum_of_lanes::<L>(quarters[2 * i], quarters[2 * i + 1]) }
    });
    // SAFETY: passed on.
    unsafe { sum_of_lanes::<L>(eighths[0], eighths[1]) }
}

/// The sums of 128-bit lanes 0 and 1, and 2 and 3, of `a`, then of `b`.
///
/// # Safety
/// As [`Lanes::join`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sum_of_lanes<L: Lanes>(a: __m512, b: __m512) -> __m512 {
    let (low, high) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    // SAFETY: passed on.
    unsafe { L::join(low, high) }
}
