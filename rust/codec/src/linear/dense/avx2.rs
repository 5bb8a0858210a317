//! AVX2 and FMA: 12 sums in registers for `nn`, up to 12 for `nt`.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::x86::avx2::{load, store};
use crate::x86::Ahead;

/// Floats in a vector.
const LANES: usize = 8;

/// `sums += x w`, (m, k) by (k, n).
///
/// Strips of 16 columns by 6 rows, so that a value of x is fetched once for two products.
/// Fewer rows are taken by halves; columns that are left of the strips, 8 at a time.
#[target_feature(enable = "avx2,fma")]
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

/// The lanes that are columns in the last vector of a strip: all bits of them are set.
#[inline]
#[target_feature(enable = "avx2")]
fn mask(width: usize) -> __m256i {
    /// Eight lanes that are set, then eight that are not.
    const LANES_SET: [f32; 16] = {
        let mut lanes = [0.0; 16];
        let mut lane = 0;
        while lane < LANES {
            lanes[lane] = f32::from_bits(u32::MAX);
            lane += 1;
        }
        lanes
    };
    let from = LANES - ((width - 1) % LANES + 1);
    let (lanes, _) = LANES_SET[from..].split_first_chunk::<LANES>().expect("from is less than 8");
    load(lanes)
}

/// A tile of a product: pointers to its first row and column, and what is the same for all.
#[derive(Clone, Copy)]
struct Tile<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    n: usize,
    mask: __m256i,
    ahead: Ahead,
}

impl Tile<'_> {
    /// Up to `rows` rows by two vectors; how many it were.
    ///
    /// # Safety
    /// As [`Tile::run`], for `rows` rows or fewer.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn two(self, rows: usize, sums: &mut [f32]) -> usize {
        match rows {
            // SAFETY: passed on.
            6.. => unsafe { self.run::<6, 2>(sums) },
            // SAFETY: passed on.
            3.. => unsafe { self.run::<3, 2>(sums) },
            // SAFETY: passed on.
            _ => unsafe { self.run::<1, 2>(sums) },
        }
    }

    /// Up to `rows` rows by one vector; how many it were.
    ///
    /// # Safety
    /// As [`Tile::run`], for `rows` rows or fewer.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn one(self, rows: usize, sums: &mut [f32]) -> usize {
        match rows {
            // SAFETY: passed on.
            6.. => unsafe { self.run::<6, 1>(sums) },
            // SAFETY: passed on.
            3.. => unsafe { self.run::<3, 1>(sums) },
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
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run<const R: usize, const V: usize>(self, sums: &mut [f32]) -> usize {
        let (x, w, last) = (self.x.as_ptr(), self.w.as_ptr(), V - 1);
        let mut tile = [[_mm256_setzero_ps(); V]; R];
        let mut ahead = self.ahead;
        for k in 0..self.k {
            ahead.fetch();
            ahead.skip(R);
            let mut row = [_mm256_setzero_ps(); V];
            for (v, row) in row.iter_mut().enumerate() {
                let lanes = if v == last { self.mask } else { _mm256_set1_epi32(-1) };
                // SAFETY: row k of w, whose columns here the caller vouches for.
                *row = unsafe { load_lanes(w, k * self.n + v * LANES, lanes) };
            }
            for (r, tile) in tile.iter_mut().enumerate() {
                // SAFETY: value k of row r of x, of which there are R.
                unsafe { add_product(x.wrapping_add(r * self.k), k, row, tile) };
            }
        }
        let sums = sums.as_mut_ptr();
        for (r, tile) in tile.into_iter().enumerate() {
            for (v, sum) in tile.into_iter().enumerate() {
                let lanes = if v == last { self.mask } else { _mm256_set1_epi32(-1) };
                let place = r * self.n + v * LANES;
                // SAFETY: row r of the sums, whose columns here the caller vouches for.
                let sum = _mm256_add_ps(unsafe { load_lanes(sums, place, lanes) }, sum);
                // SAFETY: as above.
                unsafe { _mm256_maskstore_ps(sums.wrapping_add(place), lanes, sum) };
            }
        }
        R
    }
}

/// Adds to `sums` the products of value `k` of a row of x.
///
/// By hand, since the compiler fetches the values of all rows first, which leaves no registers
/// for the sums. Miri knows no inline assembly.
///
/// # Safety
/// The value must be there.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_product<const V: usize>(
    x: *const f32,
    k: usize,
    row: [__m256; V],
    sums: &mut [__m256; V],
) {
    if cfg!(miri) {
        // SAFETY: the caller's promise.
        let value = _mm256_set1_ps(unsafe { *x.wrapping_add(k) });
        return sums.iter_mut().zip(row).for_each(|(s, w)| *s = _mm256_fmadd_ps(value, w, *s));
    }
    match (row.as_slice(), sums.as_mut_slice()) {
        // SAFETY: it reads the one value.
        ([row], [sum]) => unsafe {
            asm!(
                "vbroadcastss {value}, dword ptr [{x} + 4 * {k}]",
                "vfmadd231ps {sum}, {row}, {value}",
                x = in(reg) x,
                k = in(reg) k,
                row = in(ymm_reg) *row,
                sum = inout(ymm_reg) *sum,
                value = out(ymm_reg) _,
                options(pure, readonly, nostack),
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
                row0 = in(ymm_reg) *row0,
                row1 = in(ymm_reg) *row1,
                sum0 = inout(ymm_reg) *sum0,
                sum1 = inout(ymm_reg) *sum1,
                value = out(ymm_reg) _,
                options(pure, readonly, nostack),
            );
        },
        _ => unreachable!("a strip is one vector or two"),
    }
}

/// Some of 8 floats, zeros for the others.
///
/// # Safety
/// Those that are asked for must be there.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn load_lanes(from: *const f32, place: usize, lanes: __m256i) -> __m256 {
    // SAFETY: the caller's promise; a masked load reads nothing else.
    unsafe { _mm256_maskload_ps(from.wrapping_add(place), lanes) }
}

/// `sums += x w^T`, (m, k) by (n, k).
///
/// Groups of up to 4 rows of x meet as many rows of w as registers allow, so that each row of w
/// is fetched once a group.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn nt(x: &[f32], w: &[f32], k: usize, sums: &mut [f32]) {
    if k == 0 || w.is_empty() {
        return;
    }
    let (m, n) = (x.len() / k, w.len() / k);
    assert!(w.len() == n * k && x.len() == m * k && sums.len() == m * n);
    let groups = m.div_ceil(4);
    for group in 0..groups {
        let rows = group * m / groups..(group + 1) * m / groups;
        let (x, sums) = (&x[rows.start * k..], &mut sums[rows.start * n..]);
        match rows.len() {
            // SAFETY: so many rows of x and sums follow; w is n rows.
            1 => unsafe { dots::<1, 8>(x, w, k, sums, n) },
            // SAFETY: as above.
            2 => unsafe { dots::<2, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            3 => unsafe { dots::<3, 4>(x, w, k, sums, n) },
            // SAFETY: as above.
            _ => unsafe { dots::<4, 3>(x, w, k, sums, n) },
        }
    }
}

/// `M` rows of x with all rows of w, `N` at a time.
///
/// # Safety
/// `x` must have `M` rows of `k` values, `w` `n` of them, `sums` `M` rows of `n`.
#[target_feature(enable = "avx2,fma")]
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
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_of_dots<const M: usize, const N: usize>(
    x: &[f32],
    w: &[f32],
    k: usize,
    sums: &mut [f32],
    n: usize,
) {
    let (x, w) = (x.as_ptr(), w.as_ptr());
    let mut tile = [[_mm256_setzero_ps(); N]; M];
    let (every, last) = (_mm256_set1_epi32(-1), mask(k));
    let whole = k / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        // SAFETY: at..at + 8 lies within each row.
        unsafe { step(x, w, k, at, every, &mut tile) };
    }
    if whole < k {
        // SAFETY: the mask is what is left of each row.
        unsafe { step(x, w, k, whole, last, &mut tile) };
    }
    let mut flat = [0.0; 16];
    for (vectors, sums) in tile.as_flattened().chunks(LANES).zip(flat.as_chunks_mut::<LANES>().0) {
        let mut eight = [_mm256_setzero_ps(); LANES];
        eight[..vectors.len()].copy_from_slice(vectors);
        store(sums, _mm256_castps_si256(sum_of_each(eight)));
    }
    for (r, tile) in flat.chunks(N).take(M).enumerate() {
        sums[r * n..r * n + N].iter_mut().zip(tile).for_each(|(sum, dot)| *sum += dot);
    }
}

/// Adds the products of 8 values of each row, or of those in `lanes`.
///
/// # Safety
/// These values must be in every row.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step<const M: usize, const N: usize>(
    x: *const f32,
    w: *const f32,
    k: usize,
    at: usize,
    lanes: __m256i,
    tile: &mut [[__m256; N]; M],
) {
    let mut rows = [_mm256_setzero_ps(); N];
    for (j, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *row = unsafe { load_lanes(w, j * k + at, lanes) };
    }
    for (i, tile) in tile.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { load_lanes(x, i * k + at, lanes) };
        for (sum, row) in tile.iter_mut().zip(rows) {
            *sum = _mm256_fmadd_ps(x, row, *sum);
        }
    }
}

/// Lane `i` of the result is the sum of vector `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn sum_of_each(vectors: [__m256; 8]) -> __m256 {
    let halves: [__m256; 4] =
        core::array::from_fn(|i| _mm256_hadd_ps(vectors[2 * i], vectors[2 * i + 1]));
    let [a, b] = core::array::from_fn(|i| _mm256_hadd_ps(halves[2 * i], halves[2 * i + 1]));
    let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    _mm256_add_ps(low, high)
}
