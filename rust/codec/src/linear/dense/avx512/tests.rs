//! Products of bytes against sums of integers, and codes that become pairs against `dequantize`.

use std::ops::Range;

use half::bf16;

use crate::linear::dense::avx512::lanes::Fours;
use crate::linear::dense::avx512::{nn, nt};
use crate::linear::dense::terms::{Pair, Term, SLIVER};
use crate::linear::matvec::samples::Owned;
use crate::simd::{available, Bodies};
use crate::testing::{tables, Random, BLOCKSIZES};

/// Products of bytes, sums between others that must stay.
fn check_fours(m: usize, k: usize, n: usize) {
    let mut random = Random((m * n + k) as u64);
    let mut fours =
        |count: usize| -> Vec<[u8; 4]> { random.bytes(4 * count).as_chunks().0.to_vec() };
    // The largest magnitudes at first: sums of pairs must not saturate.
    let (mut signed, mut unsigned) = (fours(m * k), fours(n * k));
    signed[..k].fill([0x80; 4]);
    unsigned[..k].fill([0xff; 4]);
    let signed: Vec<[i8; 4]> = signed.into_iter().map(|four| four.map(|b| b as i8)).collect();
    let dot = |place: usize| -> i32 {
        let (row, column) = (&signed[place / n * k..][..k], &unsigned[place % n * k..][..k]);
        let terms = row.as_flattened().iter().zip(column.as_flattened());
        5 + terms.map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>()
    };
    let expected: Vec<i32> = (0..m * n).map(dot).collect();
    let turned: Vec<_> = (0..k).flat_map(|l| (0..n).map(move |j| (l, j))).collect();
    let turned: Vec<_> = turned.into_iter().map(|(l, j)| unsigned[j * k + l]).collect();

    let mut room = vec![5; 16 + m * n + 16];
    // SAFETY: the caller found the body, and with it the instruction.
    unsafe { nn::<Fours>(&signed, &turned, n, &mut room[16..16 + m * n], &turned) };
    assert_eq!(room[16..16 + m * n], expected, "nn {m} {k} {n}");
    room.drain(16..16 + m * n);
    assert_eq!(room, [5; 32], "nothing else is written");

    // The other way round: rows with signs are the right factor's.
    let mut sums = vec![5; m * n];
    // SAFETY: as above.
    unsafe { nt::<Fours>(&unsigned, &signed, k, &mut sums) };
    let found: Vec<i32> = (0..m * n).map(|place| sums[place % n * m + place / n]).collect();
    assert_eq!(found, expected, "nt {n} {k} {m}");
}

#[test]
fn products_of_bytes_are_sums_of_integers() {
    if available().iter().all(|bodies| bodies.int8.is_none()) {
        return; // no such machine: nothing to check
    }
    for m in (1..=18).chain([24, 28, 43]) {
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 32, 33] {
            for k in [1, 5, 16, 17, 256] {
                check_fours(m, k, n);
            }
        }
    }
}

/// Bodies that decode pairs by themselves, and the same without.
fn decoders() -> impl Iterator<Item = (&'static Bodies, &'static Bodies)> {
    let plain = available().last().copied();
    let direct = available().iter().copied().filter(|bodies| bodies.decode_pairs.is_some());
    direct.zip(plain.into_iter().cycle())
}

/// Bits; values that are too small for 16 bits without loss are zero.
fn bits(pairs: &[Pair]) -> Vec<u16> {
    let bits = |value: &bf16| match value.to_bits() {
        nan if value.is_nan() => nan | 0x8000,
        small if small & 0x7fff < 0x0080 => small & 0x8000,
        other => other,
    };
    pairs.as_flattened().iter().map(bits).collect()
}

fn check_pieces(w: &Owned, rows: &Range<usize>, columns: &Range<usize>) {
    let nan = [bf16::NAN; 2];
    let weight = w.weight();
    assert!(weight.chunks_have_scales());
    let what = format!("{} {} {}: {rows:?} {columns:?}", w.rows, w.cols, w.blocksize);
    for (direct, plain) in decoders() {
        let run = |bodies, down| {
            let mut panel = if down {
                vec![nan; rows.len().div_ceil(2) * columns.len()]
            } else {
                vec![nan; rows.len() * columns.len() / 2]
            };
            let decode = if down { Pair::decode_down::<bf16> } else { Pair::decode::<bf16> };
            decode(&weight, bodies, rows.clone(), columns.clone(), &mut panel);
            if down && rows.len() % 2 == 1 {
                // After the last row come zeros, of either sign.
                for sliver in panel.chunks_mut(rows.len().div_ceil(2) * SLIVER) {
                    let last = sliver.len() - SLIVER;
                    for [_, padding] in &mut sliver[last..] {
                        assert_eq!(padding.to_f32(), 0.0, "{what}");
                        *padding = bf16::ZERO;
                    }
                }
            }
            bits(&panel)
        };
        for down in [false, true] {
            assert!(run(direct, down) == run(plain, down), "{what}, down: {down}");
        }
    }
}

#[test]
fn pieces_of_every_block_size_are_the_pairs_that_dequantize_gives() {
    for (i, blocksize) in BLOCKSIZES.into_iter().filter(|b| b.is_multiple_of(64)).enumerate() {
        for blocks in [1, 3] {
            let cols = blocks * blocksize;
            let mut w = Owned::new(i as u64, [5, cols, blocksize], Some(tables()[i % 3]));
            // Subnormal products, and what is not finite.
            w.absmax[0] = 1e-39;
            w.absmax[blocks] = f32::NAN;
            w.absmax[2 * blocks] = f32::NEG_INFINITY;
            for w in [w, Owned::new(1, [5, cols, blocksize], Some(tables()[i % 3])).nested(2)] {
                for rows in [0..5, 1..2, 0..2, 4..5, 2..5] {
                    let last = cols - 64;
                    let starts = [0, 64, cols / 128 * 64, last];
                    for start in starts.into_iter().filter(|start| *start <= last) {
                        for len in [64, 128, 192, 256, SLIVER * 20, cols] {
                            check_pieces(&w, &rows, &(start..(start + len).min(cols)));
                        }
                    }
                }
            }
        }
    }
}
