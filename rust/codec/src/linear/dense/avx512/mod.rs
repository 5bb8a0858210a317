//! AVX-512: 28 sums in registers for `nn`, up to 24 for `nt`.
//!
//! One code for all that a lane can hold ([`lanes`]): where that is several numbers, k counts lanes.
//! The left factor lies as it is; of the right one in `nn`, a row is a vector of lanes, each with
//! neighbours along k.

pub(crate) mod decode;
mod dots;
pub(crate) mod int8;
pub(crate) mod lanes;
#[cfg(test)]
mod tests;

use std::arch::x86_64::*;

pub(crate) use dots::nt;

use crate::linear::dense::avx512::lanes::Lanes;
use crate::x86::Ahead;

/// Lanes of a vector.
const LANES: usize = 16;

/// `sums += x w`, (m, k) by (k, n).
///
/// Strips of 32 columns by 14 rows, so that a value of x is fetched once for two products.
/// Fewer rows are taken in powers of two; columns that are left of the strips, 16 at a time.
///
/// # Safety
/// The machine must have the instruction of the lanes.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn nn<L: Lanes>(
    x: &[L::Left],
    w: &[L::Right],
    n: usize,
    sums: &mut [L::Sum],
    next: &[L::Right],
) {
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
            let (x, w) = (&x[i * k..], &w[j..]);
            let tile = Tile::<L> { x, w, k, n, mask: mask(width), ahead };
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
struct Tile<'a, L: Lanes> {
    x: &'a [L::Left],
    w: &'a [L::Right],
    k: usize,
    n: usize,
    mask: u16,
    ahead: Ahead,
}

impl<L: Lanes> Tile<'_, L> {
    /// Up to `rows` rows by two vectors; how many it were.
    ///
    /// # Safety
    /// As [`Tile::run`], for `rows` rows or fewer.
    #[target_feature(enable = "avx512f")]
    unsafe fn two(self, rows: usize, sums: &mut [L::Sum]) -> usize {
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
    unsafe fn one(self, rows: usize, sums: &mut [L::Sum]) -> usize {
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
    unsafe fn run<const R: usize, const V: usize>(self, sums: &mut [L::Sum]) -> usize {
        let (x, w, last) = (self.x.as_ptr(), self.w.as_ptr().cast(), V - 1);
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
                unsafe { add_product::<L, V>(x.wrapping_add(r * self.k), k, row, tile) };
            }
        }
        let sums = sums.as_mut_ptr().cast();
        for (r, tile) in tile.into_iter().enumerate() {
            for (v, sum) in tile.into_iter().enumerate() {
                let lanes = if v == last { self.mask } else { u16::MAX };
                let place = r * self.n + v * LANES;
                // SAFETY: row r of the sums, whose columns here the caller vouches for.
                let before = unsafe { load(sums, place, lanes) };
                // SAFETY: as the caller says of the instruction.
                let sum = unsafe { L::join(before, sum) };
                // SAFETY: as above.
                unsafe { _mm512_mask_storeu_ps(sums.wrapping_add(place), lanes, sum) };
            }
        }
        R
    }
}

/// Adds to `sums` the products of lane `k` of a row of x.
///
/// # Safety
/// The lane must be there.
#[inline(always)]
unsafe fn add_product<L: Lanes, const V: usize>(
    x: *const L::Left,
    k: usize,
    row: [__m512; V],
    sums: &mut [__m512; V],
) {
    match (row.as_slice(), sums.as_mut_slice()) {
        // SAFETY: passed on.
        ([row], [sum]) => unsafe { L::add_lane(x, k, *row, sum) },
        // SAFETY: passed on.
        ([row0, row1], [sum0, sum1]) => unsafe {
            L::add_lane_twice(x, k, [*row0, *row1], [sum0, sum1]);
        },
        _ => unreachable!("a strip is one vector or two"),
    }
}

/// Some of 16 lanes, zeros for the others.
///
/// # Safety
/// Those that are asked for must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32, place: usize, lanes: u16) -> __m512 {
    // SAFETY: the caller's promise; a masked load reads nothing else.
    unsafe { _mm512_maskz_loadu_ps(lanes, from.wrapping_add(place)) }
}
