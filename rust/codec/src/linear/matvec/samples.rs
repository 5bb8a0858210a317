//! What the products of a few tokens are tested with: weights, tokens, and how a product is run.

use crate::double_quant::{decode, NESTED_BLOCKSIZE};
use crate::linear::weight::{Codes, Weight};
use crate::linear::{linear, Compute};
use crate::scales::Scales;
use crate::simd::{available, Bodies, Engine};
use crate::testing::{tables, Random};
use crate::{Values, ValuesMut};

/// A weight with its own memory. Its codes and scales are random, scales of both signs.
pub(crate) struct Owned {
    pub(crate) codes: Vec<u8>,
    /// The same as integers.
    pub(crate) signed: Vec<i8>,
    pub(crate) table: Option<[f32; 16]>,
    pub(crate) absmax: Vec<f32>,
    /// Codes and second-level scales.
    pub(crate) nested: Option<(Vec<u8>, Vec<f32>, [f32; 256])>,
    pub(crate) blocksize: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Owned {
    pub(crate) fn new(
        seed: u64,
        [rows, cols, blocksize]: [usize; 3],
        table: Option<[f32; 16]>,
    ) -> Self {
        let mut random = Random(seed);
        let len = rows * cols;
        let codes = random.bytes(if table.is_some() { len / 2 } else { len });
        let signed = codes.iter().map(|&code| (code as i8).max(-127)).collect();
        let absmax = (0..len / blocksize).map(|_| random.unit() * 0.1).collect();
        Self { codes, signed, table, absmax, nested: None, blocksize, rows, cols }
    }

    /// The same codes with random scales in 8 bits.
    pub(crate) fn nested(self, seed: u64) -> Self {
        let mut random = Random(seed);
        let blocks = self.absmax.len();
        let codes = random.bytes(blocks);
        let groups = (0..blocks.div_ceil(NESTED_BLOCKSIZE)).map(|_| random.unit()).collect();
        let table = core::array::from_fn(|i| i as f32 / 127.5 - 1.0);
        Self { nested: Some((codes, groups, table)), ..self }
    }

    pub(crate) fn weight(&self) -> Weight<'_> {
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

    pub(crate) fn value(&self, row: usize, col: usize) -> f64 {
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
    pub(crate) fn error(&self, x: &[f32], y: &[f32]) -> f64 {
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

pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.unit()).collect()
}

/// The sum of twelve uniform numbers is nearly Gaussian.
pub(crate) fn gaussian(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| (0..12).map(|_| random.unit()).sum::<f32>() / 2.0).collect()
}

pub(crate) fn run_on(engine: Engine, w: &Owned, x: &[f32], compute: Compute) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.cols * w.rows];
    let out = ValuesMut::F32(&mut y);
    linear(engine, Values::F32(x), &w.weight(), None, None, compute, out).unwrap();
    y
}

pub(crate) fn run(bodies: &'static Bodies, w: &Owned, x: &[f32], compute: Compute) -> Vec<f32> {
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

pub(crate) fn four_bit() -> impl Iterator<Item = Owned> {
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
pub(crate) fn eight_bit() -> impl Iterator<Item = Owned> {
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

/// Bodies that multiply two tokens as they do one.
pub(crate) fn without_tiles() -> impl Iterator<Item = &'static Bodies> {
    available().iter().copied().filter(|bodies| bodies.tiles.is_none())
}
