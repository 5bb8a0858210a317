//! What is added to a product before it is rounded: the adapter's part and the bias.

use std::ops::Range;

use crate::error::CodecError;
use crate::linear::adapter::Factors;
use crate::linear::dense::tokens::turn;
use crate::linear::lora;
use crate::linear::strips::Strip;
use crate::linear::weight::Weight;
use crate::scratch::Scratch;
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
        lora: Option<&'a Factors<'_>>,
    ) -> Result<Self, CodecError> {
        let lora = lora.filter(|lora| lora.rank > 0 && weight.cols > 0);
        let low_rank = |lora: &'a Factors<'_>| {
            let h = lora::down(engine, x, lora)?;
            Ok(LowRank { h, b: &lora.b, rank: lora.rank })
        };
        let lora = lora.map(low_rank).transpose()?;
        Ok(Self { bodies: engine.bodies, bias, lora })
    }

    /// The share of some columns of y.
    pub(crate) fn of(&self, columns: Range<usize>) -> StripEpilogue<'_> {
        let low_rank = self.lora.as_ref().map(|LowRank { h, b, rank }| {
            let b = &b[columns.start * rank..columns.end * rank];
            let few = h.len() <= lora::FEW * rank;
            let b = if few { Factor::Rows(b) } else { Factor::turned(self.bodies, b, *rank) };
            (&h[..], b, *rank)
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
    /// h, (tokens, rank), B of the columns, and the rank.
    low_rank: Option<(&'a [f32], Factor<'a>, usize)>,
    width: usize,
}

/// B of some columns of y.
enum Factor<'a> {
    /// (columns, rank), as it was given.
    Rows(&'a [f32]),
    /// (rank, columns).
    Turned(Scratch<f32>),
}

impl Factor<'_> {
    fn turned(bodies: &'static Bodies, b: &[f32], rank: usize) -> Self {
        let (mut turned, width) = (Scratch::new(b.len()), b.len() / rank);
        turn(bodies, (b, rank), (&mut turned, width), (width, rank));
        Self::Turned(turned)
    }
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
            match b {
                Factor::Rows(b) => (self.bodies.floats.nt)(h, b, *rank, sums),
                Factor::Turned(b) => (self.bodies.floats.nn)(h, b, width, sums, &[]),
            }
        }
        for (row, sums) in rows.zip(sums.chunks_mut(width)) {
            if let Some(bias) = self.bias {
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
            (self.bodies.round)(sums, T::values_mut(row));
        }
    }
}
