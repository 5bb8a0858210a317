//! What is added to a product before it is rounded: the adapter's part and the bias.

use std::ops::Range;

use crate::linear::forward::{widened, Lora};
use crate::linear::scratch::Scratch;
use crate::linear::strips::Strip;
use crate::linear::weight::Weight;
use crate::simd::{Bodies, Engine};
use crate::values::{Element, Values};

/// What is added to the product of a call.
pub(crate) struct Epilogue<'a> {
    bodies: &'static Bodies,
    bias: Option<&'a [f32]>,
    lora: Option<LowRank<'a>>,
}

/// `h B^T`.
struct LowRank<'a> {
    /// `scaling * x A^T`, (tokens, rank).
    h: Vec<f32>,
    /// (rows of W, rank).
    b: &'a [f32],
    rank: usize,
}

impl<'a> Epilogue<'a> {
    pub(crate) fn new(
        engine: Engine,
        x: Values<'_>,
        weight: &Weight<'_>,
        bias: Option<&'a [f32]>,
        lora: Option<Lora<'a>>,
    ) -> Self {
        let bodies = engine.bodies;
        let lora = lora.filter(|lora| lora.rank > 0 && weight.cols > 0);
        let lora = lora.map(|Lora { a, b, rank, scaling }| {
            let mut h = vec![0.0; x.len() / weight.cols * rank];
            (bodies.matmul_nt)(&widened(bodies, x), a, weight.cols, &mut h);
            h.iter_mut().for_each(|h| *h *= scaling);
            LowRank { h, b, rank }
        });
        Self { bodies, bias, lora }
    }

    /// The share of some columns of y.
    pub(crate) fn of(&self, columns: Range<usize>) -> StripEpilogue<'_> {
        let low_rank = self.lora.as_ref().map(|LowRank { h, b, rank }| {
            let b = &b[columns.start * rank..columns.end * rank];
            let mut turned = Scratch::new(b.len());
            for (r, turned) in turned.chunks_exact_mut(columns.len().max(1)).enumerate() {
                let column = b.iter().skip(r).step_by(*rank);
                turned.iter_mut().zip(column).for_each(|(to, from)| *to = *from);
            }
            (&h[..], turned, *rank)
        });
        let bias = self.bias.map(|bias| &bias[columns.clone()]);
        StripEpilogue { bodies: self.bodies, bias, low_rank, width: columns.len() }
    }

    /// Adds to the sums of a strip, (tokens, columns), and writes it.
    pub(crate) fn finish<T: Element>(&self, strip: Strip<'_, T>, sums: &mut [f32]) {
        self.of(strip.columns).finish(0, strip.rows.into_iter(), sums);
    }
}

/// What is added to some columns of y.
pub(crate) struct StripEpilogue<'a> {
    bodies: &'static Bodies,
    bias: Option<&'a [f32]>,
    /// h, (tokens, rank), B of the columns, (rank, columns), and the rank.
    low_rank: Option<(&'a [f32], Scratch<f32>, usize)>,
    width: usize,
}

impl StripEpilogue<'_> {
    /// Adds to the sums of tokens from `first` on, (tokens, columns), and writes their rows.
    pub(crate) fn finish<'r, T: Element + 'r>(
        &self,
        first: usize,
        rows: impl Iterator<Item = &'r mut [T]>,
        sums: &mut [f32],
    ) {
        let width = self.width.max(1);
        if let Some((h, b, rank)) = &self.low_rank {
            let h = &h[first * rank..][..sums.len() / width * rank];
            (self.bodies.matmul_nn)(h, b, width, sums);
        }
        for (row, sums) in rows.zip(sums.chunks_mut(width)) {
            if let Some(bias) = self.bias {
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
            (self.bodies.round)(sums, T::values_mut(row));
        }
    }
}
