//! AVX-512: 28 sums in registers for `nn`, up to 24 for `nt`.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::x86::Ahead;

/// Floats in a vector.
const LANES: usize = 16;

/// `sums += x w`, (m, k) by (k, n).
///
/// Strips of 32 columns by 14 rows, so that a value of x is fetched once for two products.
/// Fewer rows are taken in powers of two; columns that are left of the strips, 16 at a time.
#[target_feature(enable = "avx512f")]
pub(crate) fn nn(x: &[f32], w: &[f32], n: usize, sums: &mut [f32], next: &[f32]) {
    if n == 0 || w.is_empty() {
        return;
    }
    let k = w.len() / n;
    let m = x.len() / k;
    assert!(w.len() == k * n && x.len() == m * k && sums.len() == m * n);
    let mut ahead = Ahead::new(next, n.div_ceil(2 * LANES) * m * k);
    for j in (0..n).step_by(2 * LANES) {
        let width = (n - j).min(2 * LANES);
        let mut i = 0;
        while i < m {
            let rows = m - i;
            let tile = Tile { x: &x[i * k..], w: &w[j..], k, n, mask: mask(width), ahead };
            let sums = &mut sums[i * n + j..];
            let done = if width > LANES {
                // SAFETY: rows i.. and columns j.. of the matrices, whose sizes were compared; at
                // most as many rows as there are left, and columns by the mask.
                unsafe { tile.two(rows, sums) }
            } else {
                // SAFETY: as above.
                unsafe { tile.one(rows, sums) }
            };
            ahead.skip(done * k);
            i += done;
        }
    }
}

/// The lanes that are columns in the last vector of a strip.
fn mask(width: usize) -> u16 {
    u16::MAX >> ((LANES - width % LANES) % LANES)
}

/// A tile of a product: pointers to its first row and column, and what is the same for all.
#[derive(Clone, Copy)]
struct Tile<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    n: usize,
    mask: u16,
    ahead: Ahead,
}

impl Tile<'_> {
    /// Up to `rows` rows by two vectors; how many it were.
    ///
    /// # Safety
    /// As [`Tile::run`], for `rows` rows or fewer.
    #[target_feature(enable = "avx512f")]
    unsafe fn two(self, rows: usize, sums: &mut [f32]) -> usize {
        match rows {
            // SAFETY: passed on.
            14 | 17.. => unsafe { self.run::<14, 2>(sums) },
            // SAFETY: passed on. Of 16 rows, a common rank, 2 would be left over.
            8.. => unsafe { self.run::<8, 2>(sums) },
            // SAFETY: passed on.
            4.. => unsafe { self.run::<4, 2>(sums) },
            // SAFETY: passed on.
            2.. => unsafe { self.run::<2, 2>(sums) },
            // SAFETY: passed on.
            _ => unsafe { self.run::<1, 2>(sums) },
        }
    }

    /// Up to `rows` rows by one vector; how many it were.
    ///
    /// # Safety
    /// As [`Tile::run`], for `rows` rows or fewer.
    #[target_feature(enable = "avx512f")]
    unsafe fn one(self, rows: usize, sums: &mut [f32]) -> usize {
        match rows {
            // SAFETY: passed on.
            14.. => unsafe { self.run::<14, 1>(sums) },
            // SAFETY: passed on.
            8.. => unsafe { self.run::<8, 1>(sums) },
            // SAFETY: passed on.
            4.. => unsafe { self.run::<4, 1>(sums) },
            // SAFETY: passed on.
            2.. => unsafe { self.run::<2, 1>(sums) },
            // SAFETY: passed on.
            _ => unsafe { self.run::<1, 1>(sums) },
        }
    }

    /// `R` rows by `V` vectors of columns, of the last of which the mask's lanes.
    ///
    /// # Safety
    /// `x` must have `R` rows of `k` values; `w` `k` rows and `sums` `R` rows of these columns, at
    /// distances of `n`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn run<const R: usize, const V: usize>(self, sums: &mut [f32]) -> usize {
        let (x, w, last) = (self.x.as_ptr(), self.w.as_ptr(), V - 1);
        let mut tile = [[_mm512_setzero_ps(); V]; R];
        let mut ahead = self.ahead;
        for k in 0..self.k {
            ahead.fetch();
            ahead.skip(R);
            let mut row = [_mm512_setzero_ps(); V];
            for (v, row) in row.iter_mut().enumerate() {
                let lanes = if v == last { self.mask } else { u16::MAX };
                // SAFETY: row k of w, whose columns here the caller vouches for.
                *row = unsafe { load(w, k * self.n + v * LANES, lanes) };
            }
            for (r, tile) in tile.iter_mut().enumerate() {
                // SAFETY: value k of row r of x, of which there are R.
                unsafe { add_product(x.wrapping_add(r * self.k), k, row, tile) };
            }
        }
        let sums = sums.as_mut_ptr();
        for (r, tile) in tile.into_iter().enumerate() {
            for (v, sum) in tile.into_iter().enumerate() {
                let lanes = if v == last { self.mask } else { u16::MAX };
                let place = r * self.n + v * LANES;
                // SAFETY: row r of the sums, whose columns here the caller vouches for.
                let sum = _mm512_add_ps(unsafe { load(sums, place, lanes) }, sum);
                // SAFETY: as above.
                unsafe { _mm512_mask_storeu_ps(sums.wrapping_add(place), lanes, sum) };
            }
        }
        R
    }
}

/// Adds to `sums` the products of value `k` of a row of x.
///
/// By hand, since the compiler fetches the values of all rows first, which leaves no registers
/// for the sums.
///
/// # Safety
/// The value must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_product<const V: usize>(
    x: *const f32,
    k: usize,
    row: [__m512; V],
    sums: &mut [__m512; V],
) {
    match (row.as_slice(), sums.as_mut_slice()) {
        // SAFETY: it reads the one value.
        ([row], [sum]) => unsafe {
            asm!(
                "vfmadd231ps {sum}, {row}, dword ptr [{x} + 4 * {k}]{{1to16}}",
                x = in(reg) x,
                k = in(reg) k,
                row = in(zmm_reg) *row,
                sum = inout(zmm_reg) *sum,
                options(pure, readonly, nostack, preserves_flags),
            );
        },
        // SAFETY: as above.
        ([row0, row1], [sum0, sum1]) => unsafe {
            asm!(
                "vbroadcastss {value}, dword ptr [{x} + 4 * {k}]",
                "vfmadd231ps {sum0}, {row0}, {value}",
                "vfmadd231ps {sum1}, {row1}, {value}",
                x = in(reg) x,
                k = in(reg) k,
                row0 = in(zmm_reg) *row0,
                row1 = in(zmm_reg) *row1,
                sum0 = inout(zmm_reg) *sum0,
                sum1 = inout(zmm_reg) *sum1,
                value = out(zmm_reg) _,
                options(pure, readonly, nostack, preserves_flags),
            );
        },
        _ => unreachable!("a strip is one vector or two"),
    }
}

/// Some of 16 floats, zeros for the others.
///
/// # Safety
/// Those that are asked for must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32, place: usize, lanes: u16) -> __m512 {
    // SAFETY: the caller's promise; a masked load reads nothing else.
    unsafe { _mm512_maskz_loadu_ps(lanes, from.wrapping_add(place)) }
}

/// `sums += x w^T`, (m, k) by (n, k).
///
/// Groups of up to 8 rows of x meet as many rows of w as registers allow, so that each row of w
/// is fetched once a group.
#[target_feature(enable = "avx512f")]
pub(crate) fn nt(x: &[f32], w: &[f32], k: usize, sums: &mut [f32]) {
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
            1 => unsafe { dots::<1, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            2 => unsafe { dots::<2, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            3 => unsafe { dots::<3, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            4 => unsafe { dots::<4, 6>(x, w, k, sums, n) },
            // SAFETY: as above.
            5 => unsafe { dots::<5, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            6 => unsafe { dots::<6, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            7 => unsafe { dots::<7, 3>(x, w, k, sums, n) },
            // SAFETY: as above.
            _ => unsafe { dots::<8, 3>(x, w, k, sums, n) },
        }
    }
}

/// `M` rows of x with all rows of w, `N` at a time.
///
/// # Safety
/// `x` must have `M` rows of `k` values, `w` `n` of them, `sums` `M` rows of `n`.
#[target_feature(enable = "avx512f")]
unsafe fn dots<const M: usize, const N: usize>(
    x: &[f32],
    w: &[f32],
    k: usize,
    sums: &mut [f32],
    n: usize,
) {
    let whole = n / N * N;
    for j in (0..whole).step_by(N) {
        // SAFETY: rows j..j + N of w are there.
        unsafe { tile_of_dots::<M, N>(x, &w[j * k..], k, &mut sums[j..], n) };
    }
    for j in whole..n {
        // SAFETY: row j of w is there.
        unsafe { tile_of_dots::<M, 1>(x, &w[j * k..], k, &mut sums[j..], n) };
    }
}

/// # Safety
/// `x` must have `M` rows of `k` values, `w` `N` of them, `sums` `M` rows of `N` values at
/// distances of `n`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile_of_dots<const M: usize, const N: usize>(
    x: &[f32],
    w: &[f32],
    k: usize,
    sums: &mut [f32],
    n: usize,
) {
    let (x, w) = (x.as_ptr(), w.as_ptr());
    let mut tile = [[_mm512_setzero_ps(); N]; M];
    let whole = k / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        // SAFETY: at..at + 16 lies within each row.
        unsafe { step(x, w, k, at, u16::MAX, &mut tile) };
    }
    if whole < k {
        // SAFETY: the mask is what is left of each row.
        unsafe { step(x, w, k, whole, mask(k - whole), &mut tile) };
    }
    let mut flat = [0.0; 24];
    for (vectors, sums) in tile.as_flattened().chunks(LANES).zip(flat.chunks_mut(LANES)) {
        let mut sixteen = [_mm512_setzero_ps(); LANES];
        sixteen[..vectors.len()].copy_from_slice(vectors);
        let all = sum_of_each(&sixteen);
        // SAFETY: the mask is the length of the chunk, of 8 or 16 lanes.
        unsafe { _mm512_mask_storeu_ps(sums.as_mut_ptr(), mask(sums.len()), all) };
    }
    for (r, tile) in flat.chunks(N).take(M).enumerate() {
        sums[r * n..r * n + N].iter_mut().zip(tile).for_each(|(sum, dot)| *sum += dot);
    }
}

/// Adds the products of 16 values of each row, or of those in `lanes`.
///
/// # Safety
/// These values must be in every row.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn step<const M: usize, const N: usize>(
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
            *sum = _mm512_fmadd_ps(x, row, *sum);
        }
    }
}

/// Lane `i` of the result is the sum of vector `i`.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_each(vectors: &[__m512; 16]) -> __m512 {
    // Halve 16 vectors to 8, 4, 2, 1: each step pairs two vectors, half the lanes from each.
    let halves: [__m512; 8] = core::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    });
    let quarters: [__m512; 4] = core::array::from_fn(|i| {
        let (a, b) = (_mm512_castps_pd(halves[2 * i]), _mm512_castps_pd(halves[2 * i + 1]));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    });
    let eighths: [__m512; 2] =
        core::array::from_fn(|i| sum_of_lanes(quarters[2 * i], quarters[2 * i + 1]));
    sum_of_lanes(eighths[0], eighths[1])
}

/// The sums of 128-bit lanes 0 and 1, and 2 and 3, of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_lanes(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
}
