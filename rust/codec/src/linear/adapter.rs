//! The thin matrices of a low-rank adapter.

use std::ops::Deref;

use crate::error::CodecError;
use crate::layout::check_len;
use crate::linear::weight::Weight;
use crate::scratch::Scratch;
use crate::simd::Bodies;
use crate::values::Values;

/// A low-rank adapter: `scaling * (x A^T) B^T` is added to the product.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// (rank, cols) of the weight.
    pub a: Values<'a>,
    /// (rows of the weight, rank).
    pub b: Values<'a>,
    /// The rank.
    pub rank: usize,
    /// The factor.
    pub scaling: f32,
}

impl<'a> Lora<'a> {
    pub(crate) fn check(&self, weight: &Weight<'_>) -> Result<(), CodecError> {
        let Self { a, b, rank, .. } = *self;
        let sizes = [("lora_A", a.len(), weight.cols), ("lora_B", b.len(), weight.rows)];
        for (what, found, features) in sizes {
            let expected = rank.checked_mul(features).ok_or(CodecError::Row)?;
            check_len(what, found, expected, (features, "features"))?;
        }
        Ok(())
    }

    /// The matrices as floats.
    pub(crate) fn factors(&self, bodies: &'static Bodies) -> Factors<'a> {
        let [a, b] = [self.a, self.b].map(|values| Floats::new(bodies, values));
        Factors { a, b, rank: self.rank, scaling: self.scaling }
    }
}

/// An adapter in fp32.
pub(crate) struct Factors<'a> {
    pub(crate) a: Floats<'a>,
    pub(crate) b: Floats<'a>,
    pub(crate) rank: usize,
    pub(crate) scaling: f32,
}

/// Floats as they were given, or widened.
pub(crate) enum Floats<'a> {
    Given(&'a [f32]),
    Widened(Scratch<f32>),
}

impl<'a> Floats<'a> {
    pub(crate) fn new(bodies: &'static Bodies, values: Values<'a>) -> Self {
        if let Values::F32(floats) = values {
            return Self::Given(floats);
        }
        let mut room = Scratch::new(values.len());
        (bodies.widen)(values, &mut room);
        Self::Widened(room)
    }
}

impl Deref for Floats<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Self::Given(floats) => floats,
            Self::Widened(room) => room,
        }
    }
}
