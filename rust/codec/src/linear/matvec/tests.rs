//! Products of a few tokens against sums in f64 over codes and scales.

use super::*;
use crate::codebook::tests::NF4;
use crate::double_quant::{decode, NESTED_BLOCKSIZE};
use crate::linear::weight::{Codes, Scales};
use crate::linear::{linear, Compute};
use crate::simd::{available, Bodies};
use crate::testing::{tables, Random, Weights};
use crate::{Values, ValuesMut};

/// A weight with its own memory. Its codes and scales are random, scales of both signs.
struct Owned {
    codes: Vec<u8>,
    /// The same as integers.
    signed: Vec<i8>,
    table: Option<[f32; 16]>,
    absmax: Vec<f32>,
    /// Codes and second-level scales.
    nested: Option<(Vec<u8>, Vec<f32>, [f32; 256])>,
    blocksize: usize,
    rows: usize,
    cols: usize,
}

impl Owned {
    fn new(seed: u64, [rows, cols, blocksize]: [usize; 3], table: Option<[f32; 16]>) -> Self {
        let mut random = Random(seed);
        let len = rows * cols;
        let codes = random.bytes(if table.is_some() { len / 2 } else { len });
        let signed = codes.iter().map(|&code| (code as i8).max(-127)).collect();
        let absmax = (0..len / blocksize).map(|_| random.unit() * 0.1).collect();
        Self { codes, signed, table, absmax, nested: None, blocksize, rows, cols }
    }

    /// The same codes with random scales in 8 bits.
    fn nested(self, seed: u64) -> Self {
        let mut random = Random(seed);
        let blocks = self.absmax.len();
        let codes = random.bytes(blocks);
        let groups = (0..blocks.div_ceil(NESTED_BLOCKSIZE)).map(|_| random.unit()).collect();
        let table = core::array::from_fn(|i| i as f32 / 127.5 - 1.0);
        Self { nested: Some((codes, groups, table)), ..self }
    }

    fn weight(&self) -> Weight<'_> {
        Weight {
            codes: match &self.table {
                Some(table) => Codes::FourBit { packed: &self.codes, table },
                None => Codes::Int8(&self.signed),
            },
            scales: match &self.nested {
                Some((codes, nested, table)) => {
                    Scales::Nested { codes, table, nested, offset: 0.1 }
                }
                None => Scales::Plain(&self.absmax),
            },
            blocksize: self.blocksize,
            rows: self.rows,
            cols: self.cols,
        }
    }

    fn value(&self, row: usize, col: usize) -> f64 {
        let i = row * self.cols + col;
        let block = i / self.blocksize;
        let scale = match &self.nested {
            Some((codes, nested, table)) => {
                decode(table, codes[block], nested[block / NESTED_BLOCKSIZE], 0.1)
            }
            None => self.absmax[block],
        };
        let code = match &self.table {
            Some(table) => {
                let byte = self.codes[i / 2];
                f64::from(
                    table[usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })],
                )
            }
            None => f64::from(self.signed[i]) / 127.0,
        };
        code * f64::from(scale)
    }

    /// Largest error of the products of tokens, in units of the sums of magnitudes.
    fn error(&self, x: &[f32], y: &[f32]) -> f64 {
        let mut worst = 0.0_f64;
        for (x, y) in x.chunks(self.cols).zip(y.chunks(self.rows)) {
            for (row, y) in y.iter().enumerate() {
                let terms = x.iter().enumerate().map(|(k, &x)| self.value(row, k) * f64::from(x));
                let (sum, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
                let error = (f64::from(*y) - sum).abs() / size.max(1e-30);
                worst = if error > worst || error.is_nan() { error } else { worst };
            }
        }
        worst
    }
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.unit()).collect()
}

/// The sum of twelve uniform numbers is nearly Gaussian.
fn gaussian(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| (0..12).map(|_| random.unit()).sum::<f32>() / 2.0).collect()
}

fn run_on(engine: Engine, w: &Owned, x: &[f32], compute: Compute) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.cols * w.rows];
    let out = ValuesMut::F32(&mut y);
    linear(engine, Values::F32(x), &w.weight(), None, None, compute, out).unwrap();
    y
}

fn run(bodies: &'static Bodies, w: &Owned, x: &[f32], compute: Compute) -> Vec<f32> {
    run_on(Engine::new(bodies, 1), w, x, compute)
}

/// Rows, columns, block size of 4-bit codes: rows around what is multiplied together, all ends of a
/// row within a chunk, blocks within and across chunks, more scales than are loaded at once.
const SHAPES: [[usize; 3]; 16] = [
    [1, 32, 32],
    [1, 64, 64],
    [3, 96, 32],
    [5, 128, 32],
    [4, 128, 64],
    [7, 160, 32],
    [9, 192, 64],
    [2, 224, 32],
    [6, 576, 32],
    [67, 1088, 64],
    [5, 1216, 64],
    [3, 1152, 128],
    [3, 2304, 256],
    [2, 3072, 1024],
    [3, 8192, 4096],
    [2, 17472, 64],
];

fn four_bit() -> impl Iterator<Item = Owned> {
    SHAPES.into_iter().enumerate().map(|(i, shape)| {
        let seed = i as u64;
        let w = Owned::new(seed, shape, Some(tables()[i % 3]));
        if i % 2 == 0 {
            w.nested(seed)
        } else {
            w
        }
    })
}

/// The same of 8-bit codes: blocks of any length, and rows.
fn eight_bit() -> impl Iterator<Item = Owned> {
    let shapes = [
        [1, 1, 1],
        [3, 33, 33],
        [5, 100, 100],
        [6, 300, 100],
        [4, 128, 64],
        [9, 192, 64],
        [5, 1216, 64],
        [67, 1000, 1000],
        [3, 2304, 256],
        [2, 4096, 4096],
        [3, 630, 7],
    ];
    shapes.into_iter().enumerate().map(|(i, shape)| {
        let w = Owned::new(i as u64, shape, None);
        if i % 3 == 2 {
            w.nested(i as u64)
        } else {
            w
        }
    })
}

#[test]
fn every_body_sums_the_products_of_codes_scales_and_values() {
    for w in four_bit().chain(eight_bit()) {
        for tokens in 1..=MAX_TOKENS {
            let x = random(w.cols as u64, tokens * w.cols);
            for bodies in available() {
                let y = run(bodies, &w, &x, Compute::Exact);
                let (name, error) = (bodies.name(), w.error(&x, &y));
                let shape = [w.rows, w.cols, w.blocksize];
                assert!(error < 1e-6, "{name} {shape:?} M={tokens}: {error:e}");
            }
        }
    }
}

#[test]
fn an_odd_code_is_in_the_low_nibble() {
    let mut w = Owned::new(0, [1, 64, 64], Some(NF4));
    w.codes.fill(0x7f); // 0 and 1
    w.absmax.fill(2.0);
    let mut x = vec![0.0; 64];
    for k in 0..64 {
        x.fill(0.0);
        x[k] = 3.0;
        for bodies in available() {
            let expected = if k % 2 == 0 { 0.0 } else { 6.0 };
            assert_eq!(run(bodies, &w, &x, Compute::Exact), [expected], "{} at {k}", bodies.name());
        }
    }
}

#[test]
fn a_token_gives_the_same_bytes_alone_and_among_others() {
    for w in four_bit().chain(eight_bit()) {
        let x = random(7, MAX_TOKENS * w.cols);
        for bodies in without_tiles() {
            for compute in [Compute::Exact, Compute::Int8] {
                let alone: Vec<f32> =
                    x.chunks(w.cols).flat_map(|x| run(bodies, &w, x, compute)).collect();
                for tokens in 2..=MAX_TOKENS {
                    let y = run(bodies, &w, &x[..tokens * w.cols], compute);
                    assert_eq!(y, alone[..tokens * w.rows], "{} M={tokens}", bodies.name());
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let w = Owned::new(1, [2050, 1088, 64], Some(NF4));
    let x = random(2, 2 * w.cols);
    for bodies in available() {
        for compute in [Compute::Exact, Compute::Int8] {
            let one = run(bodies, &w, &x, compute);
            for threads in [2, 0, 7] {
                let y = run_on(Engine::new(bodies, threads), &w, &x, compute);
                assert_eq!(y, one, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn x_of_16_bits_is_widened_and_the_sums_are_rounded_once() {
    let w = Owned::new(1, [70, 192, 64], Some(NF4));
    for x in Weights::all(&random(3, w.cols)) {
        for bodies in available() {
            let sums = run(bodies, &w, &x.widened(), Compute::Exact);
            let [y32, y16, y_bf16] = Weights::all(&sums);
            let mut y = match &x {
                Weights::F32(_) => y32.clone(),
                Weights::F16(_) => y16.clone(),
                Weights::Bf16(_) => y_bf16.clone(),
            };
            let expected = y.bits();
            let engine = Engine::new(bodies, 1);
            linear(engine, x.values(), &w.weight(), None, None, Compute::Exact, y.values_mut())
                .unwrap();
            assert_eq!(y.bits(), expected, "{}", bodies.name());
        }
    }
}

#[test]
fn a_scale_that_is_not_finite_spoils_its_row_alone() {
    for table in [Some(NF4), None] {
        for (row, block) in [(0, 0), (3, 2), (6, 2), (4, 1)] {
            for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut w = Owned::new(5, [7, 192, 64], table);
                w.absmax[row * 3 + block] = scale;
                let x = random(6, 2 * w.cols);
                for bodies in available() {
                    for compute in [Compute::Exact, Compute::Int8] {
                        for y in run(bodies, &w, &x, compute).chunks(w.rows) {
                            let spoilt: Vec<_> = (0..7).filter(|&i| !y[i].is_finite()).collect();
                            assert_eq!(spoilt, [row], "{} {compute:?} {scale}", bodies.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_token_alone() {
    for table in [Some(NF4), None] {
        let w = Owned::new(5, [7, 192, 64], table);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = random(6, 3 * w.cols);
            x[w.cols + 70] = bad;
            for bodies in available() {
                for compute in [Compute::Exact, Compute::Int8] {
                    let y = run(bodies, &w, &x, compute);
                    for (token, y) in y.chunks(w.rows).enumerate() {
                        let finite = y.iter().all(|y| y.is_finite());
                        assert_eq!(finite, token != 1, "{} {compute:?}", bodies.name());
                    }
                }
            }
        }
    }
}

#[test]
fn scales_and_values_near_the_ends_of_the_range_do_not_overflow_or_vanish() {
    for table in [Some(NF4), None] {
        for (scale, size) in [(3e37, 0.1), (1e-30, 1e30), (1e30, 1e-30), (1e-37, 1.0)] {
            let mut w = Owned::new(5, [5, 192, 64], table);
            w.absmax.iter_mut().for_each(|a| *a *= 10.0 * scale);
            let mut x = random(6, w.cols);
            x = x.into_iter().map(|x| x * size).collect();
            for bodies in available() {
                let name = bodies.name();
                let error = w.error(&x, &run(bodies, &w, &x, Compute::Exact));
                assert!(error < 1e-6, "{name} {scale:e}: {error:e}");
                let error = w.error(&x, &run(bodies, &w, &x, Compute::Int8));
                assert!(error < 1e-2, "{name} int8 {scale:e}: {error:e}");
            }
        }
    }
}

/// Bodies that multiply two tokens as they do one.
fn without_tiles() -> impl Iterator<Item = &'static Bodies> {
    available().iter().copied().filter(|bodies| bodies.tiles.is_none())
}

/// Sums in integers are exact: bodies differ by the rounding of sums of blocks.
#[test]
fn every_body_computes_the_same_integers() {
    for w in four_bit().chain(eight_bit()) {
        let x = gaussian(w.cols as u64, 2 * w.cols);
        let scalar = run(available()[available().len() - 1], &w, &x, Compute::Int8);
        let mut outputs: Vec<_> = without_tiles()
            .map(|bodies| (bodies.name(), run(bodies, &w, &x, Compute::Int8)))
            .collect();
        outputs.extend(without_vnni(&w, &x));
        for (name, y) in outputs {
            for (i, (y, expected)) in y.iter().zip(&scalar).enumerate() {
                let row = i % w.rows;
                let x = &x[i / w.rows * w.cols..][..w.cols];
                let terms = x.iter().enumerate().map(|(k, &x)| w.value(row, k) * f64::from(x));
                let size: f64 = terms.map(f64::abs).sum();
                let difference = f64::from(y - expected).abs() / size;
                let shape = [w.rows, w.cols, w.blocksize];
                assert!(difference < 1e-6, "{name} {shape:?}: {y} is not {expected}");
            }
        }
    }
}

/// What machines without VNNI compute, on one that may have it.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn without_vnni(w: &Owned, x: &[f32]) -> Option<(&'static str, Vec<f32>)> {
    let bodies = available().iter().find(|bodies| bodies.name() == "avx2")?;
    let weight = w.weight();
    if !int8::serves(&weight) {
        return None;
    }
    let mut y = vec![f32::NAN; x.len() / w.cols * w.rows];
    let x = Rounded::new(bodies, x, &weight);
    // SAFETY: this machine can run the AVX2 bodies.
    unsafe { int8::avx2::multiply(&weight, 0..w.rows, &x, &mut y) };
    Some(("avx2 without VNNI", y))
}

#[cfg(not(target_arch = "x86_64"))]
fn without_vnni(_: &Owned, _: &[f32]) -> Option<(&'static str, Vec<f32>)> {
    None
}

/// The error that the documentation of [`Compute::Int8`] states.
#[test]
fn rounding_x_to_8_bits_costs_what_the_documentation_says() {
    for (table, bound) in [(Some(NF4), 0.0065), (None, 0.0065)] {
        let mut w = Owned::new(9, [200, 4096, 64], table);
        w.absmax.iter_mut().for_each(|a| *a = a.abs() + 0.05);
        let x = gaussian(10, w.cols);
        for bodies in available() {
            let y = run(bodies, &w, &x, Compute::Int8);
            let (mut squares, mut errors) = (0.0, 0.0);
            for (row, y) in y.iter().enumerate() {
                let terms = x.iter().enumerate().map(|(k, &x)| w.value(row, k) * f64::from(x));
                let sum: f64 = terms.sum();
                squares += sum * sum;
                errors += (f64::from(*y) - sum) * (f64::from(*y) - sum);
            }
            let error = f64::sqrt(errors / squares);
            assert!(error > 0.003, "{}: {error:e} is too good to be of 8 bits", bodies.name());
            assert!(error < bound, "{}: {error:e}", bodies.name());
        }
    }
}

#[test]
fn a_table_becomes_integers_of_14_bits() {
    for table in tables() {
        let ([high, low], unit) = int8::integers(&table);
        for i in 0..16 {
            let integer = 128 * (i32::from(high[i]) - 64) + i32::from(low[i]);
            assert!(high[i] < 128 && low[i] < 128, "pairs of products fit 16 bits");
            assert!((integer as f32 * unit - table[i]).abs() <= 0.501 * unit, "{}", table[i]);
        }
    }
    let ([high, low], unit) = int8::integers(&[0.0; 16]);
    assert_eq!((high, low, unit), ([64; 16], [0; 16], 0.0));
}
