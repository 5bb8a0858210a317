//! AVX-512: 28 sums in registers for `nn`, up to 24 for `nt`.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::values::{Element, Values, ValuesMut};
use crate::x86::avx512::{load_f16, load_f32, round_to_bf16, store, store_half};

/// Floats in a vector.
const LANES: usize = 16;

/// `sums += x w`, (m, k) by (k, n).
///
/// Strips of 32 columns by 14 rows, so that a value of x is fetched once for two products.
/// Fewer rows are taken in powers of two; columns that are left of the strips, 16 at a time.
#[target_feature(enable = "avx512f")]
pub(crate) fn nn(x: &[f32], w: &[f32], n: usize, sums: &mut [f32]) {
    if n == 0 || w.is_empty() {
        return;
    }
    let k = w.len() / n;
    let m = x.len() / k;
    assert!(w.len() == k * n && x.len() == m * k && sums.len() == m * n);
    for j in (0..n).step_by(2 * LANES) {
        let width = (n - j).min(2 * LANES);
        let mut i = 0;
        while i < m {
            let rows = m - i;
            let tile = Tile { x: &x[i * k..], w: &w[j..], k, n, mask: mask(width) };
            let sums = &mut sums[i * n + j..];
            // SAFETY: rows i.. and columns j.. of the matrices, whose sizes were compared; at
            // most as many rows as there are left, and columns by the mask.
            i += unsafe {
                if width > LANES {
                    tile.two(rows, sums)
                } else {
                    tile.one(rows, sums)
                }
            };
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
            14.. => unsafe { self.run::<14, 2>(sums) },
            // SAFETY: passed on.
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
        for k in 0..self.k {
            let mut row = [_mm512_setzero_ps(); V];
            for (v, row) in row.iter_mut().enumerate() {
                let lanes = if v == last { self.mask } else { u16::MAX };
                // SAFETY: row k of w, whose columns here the caller vouches for.
                *row = unsafe { load(w, k * self.n + v * LANES, lanes) };
            }
            for (r, tile) in tile.iter_mut().enumerate() {
                // SAFETY: value k of row r of x, of which there are R.
                unsafe { add_product(x.add(r * self.k), k, row, tile) };
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
                unsafe { _mm512_mask_storeu_ps(sums.add(place), lanes, sum) };
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
    unsafe { _mm512_maskz_loadu_ps(lanes, from.add(place)) }
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
        // SAFETY: so many rows of x and sums follow; w is n rows.
        unsafe {
            match rows.len() {
                1 => dots::<1, 8>(x, w, k, sums, n),
                2 => dots::<2, 8>(x, w, k, sums, n),
                3 => dots::<3, 8>(x, w, k, sums, n),
                4 => dots::<4, 6>(x, w, k, sums, n),
                5 => dots::<5, 4>(x, w, k, sums, n),
                6 => dots::<6, 4>(x, w, k, sums, n),
                7 => dots::<7, 3>(x, w, k, sums, n),
                _ => dots::<8, 3>(x, w, k, sums, n),
            }
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
        let all = sum_of_each(sixteen);
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
fn sum_of_each(vectors: [__m512; 16]) -> __m512 {
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

/// Turns 16 rows of 16 floats into columns.
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(square: &mut [[f32; 16]; 16]) {
    let mut rows = [_mm512_setzero_ps(); 16];
    for (to, from) in rows.iter_mut().zip(&*square) {
        *to = load_f32(from);
    }
    // Pairs of rows by values, then by pairs of values, then by 128-bit lanes, twice.
    let pairs: [__m512d; 16] = core::array::from_fn(|i| {
        let (a, b) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
        let pair = if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) };
        _mm512_castps_pd(pair)
    });
    // fours[4 q + c]: column c of each 128-bit lane, rows 4 q..4 q + 4.
    let fours: [__m512; 16] = core::array::from_fn(|i| {
        let (q, c) = (i / 4, i % 4);
        let (a, b) = (pairs[4 * q + c / 2], pairs[4 * q + 2 + c / 2]);
        let four = if c % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) };
        _mm512_castpd_ps(four)
    });
    for c in 0..4 {
        let [a, b, d, e]: [__m512; 4] = core::array::from_fn(|q| fours[4 * q + c]);
        let low = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e)];
        let high = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e)];
        let columns = [
            _mm512_shuffle_f32x4::<0x88>(low[0], low[1]),
            _mm512_shuffle_f32x4::<0x88>(high[0], high[1]),
            _mm512_shuffle_f32x4::<0xdd>(low[0], low[1]),
            _mm512_shuffle_f32x4::<0xdd>(high[0], high[1]),
        ];
        for (lane, column) in columns.into_iter().enumerate() {
            store(&mut square[4 * lane + c], _mm512_castps_si512(column));
        }
    }
}

/// Writes the values as floats.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn widen(values: Values<'_>, floats: &mut [f32]) {
    assert_eq!(values.len(), floats.len());
    let (vectors, rest) = floats.as_chunks_mut::<LANES>();
    match values {
        Values::F32(values) => floats.copy_from_slice(values),
        Values::F16(values) => {
            let (values, tail) = values.as_chunks();
            for (to, from) in vectors.iter_mut().zip(values) {
                store(to, _mm512_castps_si512(load_f16(from)));
            }
            Element::widen(tail, rest);
        }
        Values::Bf16(values) => {
            let (values, tail) = values.as_chunks::<LANES>();
            for (to, from) in vectors.iter_mut().zip(values) {
                // SAFETY: the array is 32 bytes long; the load takes any alignment.
                let bits = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
                store(to, _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
            }
            Element::widen(tail, rest);
        }
    }
}

/// Rounds to nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn round(floats: &[f32], values: ValuesMut<'_>) {
    assert_eq!(values.len(), floats.len());
    let (vectors, rest) = floats.as_chunks::<LANES>();
    match values {
        ValuesMut::F32(values) => values.copy_from_slice(floats),
        ValuesMut::F16(values) => {
            let (to, tail) = values.as_chunks_mut::<LANES>();
            for (to, from) in to.iter_mut().zip(vectors) {
                let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(from));
                store_half(to, rounded);
            }
            Element::narrow(rest, tail);
        }
        ValuesMut::Bf16(values) => {
            let (to, tail) = values.as_chunks_mut::<LANES>();
            for (to, from) in to.iter_mut().zip(vectors) {
                let floats = load_f32(from);
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(floats, floats);
                let quiet = _mm512_set1_epi32(0x7fc0_0000);
                let bits = _mm512_mask_mov_epi32(round_to_bf16(floats), nan, quiet);
                store_half(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
            }
            Element::narrow(rest, tail);
        }
    }
}
