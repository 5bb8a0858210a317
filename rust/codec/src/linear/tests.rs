//! Linear layers against sums in f64 over dequantized weights.

use super::*;
use crate::codebook::tests::NF4;
use crate::testing::{Random, Weights};
use crate::Scales;
use crate::{
    available, dequantize_4bit, quantize_4bit, Bodies, Codebook, Engine, NonFinite, Values,
    ValuesMut,
};

/// A quantized matrix with its own memory.
pub(crate) struct Owned {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    blocksize: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Owned {
    pub(crate) fn new(seed: u64, rows: usize, cols: usize, blocksize: usize) -> Self {
        let mut random = Random(seed);
        let len = rows * cols;
        let values: Vec<f32> = (0..len).map(|_| random.unit() * 0.05).collect();
        let mut packed = vec![0; len.div_ceil(2)];
        let mut absmax = vec![0.0; len.div_ceil(blocksize)];
        let code = Codebook::new(&NF4).unwrap();
        let (engine, values) = (Engine::new(available()[0], 1), Values::F32(&values));
        let keep = NonFinite::Error;
        quantize_4bit(engine, values, &code, blocksize, keep, &mut packed, &mut absmax).unwrap();
        Self { packed, absmax, blocksize, rows, cols }
    }

    pub(crate) fn weight(&self) -> Weight<'_> {
        Weight {
            codes: Codes::FourBit { packed: &self.packed, table: &NF4 },
            scales: Scales::Plain(&self.absmax),
            blocksize: self.blocksize,
            rows: self.rows,
            cols: self.cols,
        }
    }

    /// In the dtype of `like`, as f64.
    pub(crate) fn dense(&self, like: &Weights) -> Vec<f64> {
        let mut out = match like {
            Weights::F32(_) => Weights::F32(vec![0.0; self.rows * self.cols]),
            Weights::F16(_) => Weights::F16(vec![half::f16::ZERO; self.rows * self.cols]),
            Weights::Bf16(_) => Weights::Bf16(vec![half::bf16::ZERO; self.rows * self.cols]),
        };
        let engine = Engine::new(available()[0], 1);
        let values: ValuesMut<'_> = out.values_mut();
        dequantize_4bit(
            engine,
            &self.packed,
            &self.absmax,
            &NF4,
            self.blocksize,
            values,
            crate::Stores::Cached,
        )
        .unwrap();
        out.widened().into_iter().map(f64::from).collect()
    }
}

pub(super) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.unit()).collect()
}

/// The sum, and the sum of magnitudes that its error is measured by.
fn product(x: &[f64], w: &[f64]) -> (f64, f64) {
    x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
}

/// Largest error of `y` against the product in f64, in units of the sums of magnitudes.
fn error(x: &Weights, w: &Owned, y: &Weights) -> f64 {
    let dense = w.dense(x);
    let x: Vec<f64> = x.widened().into_iter().map(f64::from).collect();
    let y = y.widened();
    let mut worst = 0.0_f64;
    for (x, y) in x.chunks(w.cols).zip(y.chunks(w.rows)) {
        for (w, y) in dense.chunks(w.cols).zip(y) {
            let (sum, size) = product(x, w);
            worst = worst.max((f64::from(*y) - sum).abs() / size.max(1e-30));
        }
    }
    worst
}

fn run(bodies: &'static Bodies, threads: usize, x: &Weights, w: &Owned) -> Weights {
    computed(bodies, threads, Compute::Exact, x, w)
}

fn computed(
    bodies: &'static Bodies,
    threads: usize,
    compute: Compute,
    x: &Weights,
    w: &Owned,
) -> Weights {
    let tokens = x.widened().len() / w.cols;
    let mut y = match x {
        Weights::F32(_) => Weights::F32(vec![f32::NAN; tokens * w.rows]),
        Weights::F16(_) => Weights::F16(vec![half::f16::NAN; tokens * w.rows]),
        Weights::Bf16(_) => Weights::Bf16(vec![half::bf16::NAN; tokens * w.rows]),
    };
    let engine = Engine::new(bodies, threads);
    linear(engine, x.values(), &w.weight(), None, None, compute, y.values_mut()).unwrap();
    y
}

const SHAPES: [(usize, usize, usize); 9] = [
    (64, 128, 64),
    (65, 192, 64),    // a strip of one row, half a chunk
    (130, 64, 32),    // small blocks
    (16, 4096, 4096), // a block a row
    (33, 100, 64),    // rows that share blocks
    (7, 33, 64),      // an odd number of codes a row
    (1, 1, 64),
    (200, 576, 64),
    (96, 1024, 256),
];

#[test]
fn every_body_multiplies_what_dequantize_gives() {
    for (i, (rows, cols, blocksize)) in SHAPES.into_iter().enumerate() {
        let w = Owned::new(i as u64, rows, cols, blocksize);
        for tokens in [1, 2, 3, 8, 9, 15, 16, 17, 25, 31, 33, 64, 70] {
            for x in Weights::all(&random(99 + i as u64, tokens * cols)) {
                // half an ulp of the output, and the rounding of sums
                let tolerance = match x {
                    Weights::F32(_) => 1e-6,
                    Weights::F16(_) => 1e-3,
                    Weights::Bf16(_) => 8e-3,
                };
                for bodies in available() {
                    let y = run(bodies, 1, &x, &w);
                    let error = error(&x, &w, &y);
                    let name = bodies.name();
                    assert!(error < tolerance, "{name} {rows}x{cols} M={tokens}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let w = Owned::new(5, 1000, 1024, 64);
    for x in Weights::all(&random(7, 33 * 1024)) {
        for bodies in available() {
            for compute in [Compute::Exact, Compute::Int8] {
                let one = computed(bodies, 1, compute, &x, &w).bits();
                for threads in [2, 0, 7] {
                    let more = computed(bodies, threads, compute, &x, &w).bits();
                    assert!(more == one, "{} {compute:?}, {threads} threads", bodies.name());
                }
            }
        }
    }
}

#[test]
fn bias_and_adapter_are_added_before_the_rounding() {
    let (rows, cols, tokens, rank) = (70, 128, 5, 3);
    let w = Owned::new(1, rows, cols, 64);
    let (bias, a, b) = (random(2, rows), random(3, rank * cols), random(4, rows * rank));
    let lora = Lora { a: Values::F32(&a), b: Values::F32(&b), rank, scaling: 0.5 };
    let x = random(5, tokens * cols);
    let dense = w.dense(&Weights::F32(Vec::new()));
    for bodies in available() {
        let mut y = vec![f32::NAN; tokens * rows];
        let (engine, out) = (Engine::new(bodies, 1), ValuesMut::F32(&mut y));
        linear(engine, Values::F32(&x), &w.weight(), Some(&bias), Some(lora), Compute::Exact, out)
            .unwrap();
        for (x, y) in x.chunks(cols).zip(y.chunks(rows)) {
            let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
            let dot = |w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum::<f64>();
            let h: Vec<f64> = a.chunks(cols).map(|a| 0.5 * dot(a)).collect();
            for (j, y) in y.iter().enumerate() {
                let adapter: f64 = (0..rank).map(|r| h[r] * f64::from(b[j * rank + r])).sum();
                let base = product(&x, &dense[j * cols..(j + 1) * cols]).0;
                let expected = base + adapter + f64::from(bias[j]);
                assert!((f64::from(*y) - expected).abs() < 1e-4, "{}", bodies.name());
            }
        }
    }
}

/// Root of the mean square of the error over that of the product.
fn relative_error(x: &Weights, w: &Owned, y: &Weights) -> f64 {
    let dense = w.dense(x);
    let x: Vec<f64> = x.widened().into_iter().map(f64::from).collect();
    let (mut wrong, mut size) = (0.0, 0.0);
    for (x, y) in x.chunks(w.cols).zip(y.widened().chunks(w.rows)) {
        for (w, y) in dense.chunks(w.cols).zip(y) {
            let sum = product(x, w).0;
            wrong += (f64::from(*y) - sum).powi(2);
            size += sum * sum;
        }
    }
    (wrong / size).sqrt()
}

#[test]
fn eight_bit_products_are_off_by_a_hundredth() {
    for (i, (rows, cols, blocksize)) in SHAPES.into_iter().enumerate() {
        let w = Owned::new(i as u64, rows, cols, blocksize);
        for tokens in [1, 2, 16, 17, 33] {
            let x = Weights::F32(random(99 + i as u64, tokens * cols));
            for bodies in available() {
                let one = computed(bodies, 1, Compute::Int8, &x, &w);
                let error = relative_error(&x, &w, &one);
                assert!(error < 0.02, "{} {rows}x{cols} M={tokens}: {error}", bodies.name());
                let two = computed(bodies, 2, Compute::Int8, &x, &w);
                assert_eq!(one.bits(), two.bits());
            }
        }
    }
}
