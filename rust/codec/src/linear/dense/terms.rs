//! What panels are made of: fp32 numbers, or pairs of bfloat16 numbers.
//!
//! A term is 32 bits of a vector. Two numbers in it are neighbours along the sum, are multiplied
//! with two of the other factor, and both products are added to one fp32 sum; after an odd number of
//! values comes a zero.

use std::ops::Range;

use half::bf16;

use crate::linear::weight::Weight;
use crate::plain::Plain;
use crate::simd::Bodies;
use crate::values::{Element, Values};

/// Two neighbours along a sum.
pub(crate) type Pair = [bf16; 2];

/// Products of matrices of terms, see [`dense`](super).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Products<P: 'static> {
    /// x, w, terms of a row, sums.
    pub(crate) nt: NtFn<P>,
    /// x, w, columns of w, sums, and what is needed next.
    pub(crate) nn: NnFn<P>,
}

type NtFn<P> = fn(&[P], &[P], usize, &mut [f32]);
type NnFn<P> = fn(&[P], &[P], usize, &mut [f32], &[P]);

/// Columns of a sliver of a panel: what meets a vector or two of sums.
pub(crate) const SLIVER: usize = 32;

/// What 32 bits of a vector hold.
pub(crate) trait Lane: Plain + Send + Sync {
    /// Values of a lane.
    const VALUES: usize;
    /// No value.
    const ZERO: Self;

    /// Turns 16 rows of 16 lanes into columns.
    fn transpose(bodies: &'static Bodies, square: &mut [[Self; 16]; 16]);
}

/// A term of a sum in fp32.
pub(crate) trait Term: Lane {
    /// Columns of a sliver of a panel that [`Term::decode_down`] writes, at most.
    const SLIVER: usize;

    /// Writes values as they are multiplied.
    fn lay_out(bodies: &'static Bodies, values: Values<'_>, to: &mut [Self]);

    /// Writes a piece of a weight, rounded to `T`, as (rows, terms of columns).
    fn decode<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    );

    /// Writes a piece of a weight, rounded to `T`, as slivers of columns, the last of
    /// which may be narrower: of each, (terms of rows, columns).
    fn decode_down<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    );
}

/// Terms of so many values.
pub(crate) fn terms<P: Lane>(values: usize) -> usize {
    values.div_ceil(P::VALUES)
}

impl Lane for f32 {
    const VALUES: usize = 1;
    const ZERO: Self = 0.0;

    fn transpose(bodies: &'static Bodies, square: &mut [[Self; 16]; 16]) {
        (bodies.transpose)(square);
    }
}

impl Term for f32 {
    /// Panels have no slivers.
    const SLIVER: usize = usize::MAX;

    fn lay_out(bodies: &'static Bodies, values: Values<'_>, to: &mut [Self]) {
        (bodies.widen)(values, to);
    }

    fn decode<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    ) {
        weight.widened_piece::<T>(bodies, rows, columns, panel);
    }

    fn decode_down<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    ) {
        weight.widened_piece::<T>(bodies, rows, columns, panel);
    }
}

/// Writes a row of terms into slivers of `height` of them.
fn scatter<P: Copy>(terms: &[P], height: usize, row: usize, slivers: &mut [P]) {
    let slivers = slivers.chunks_mut(height * SLIVER);
    for (sliver, terms) in slivers.zip(terms.chunks(SLIVER)) {
        sliver[row * terms.len()..][..terms.len()].copy_from_slice(terms);
    }
}

impl Lane for Pair {
    const VALUES: usize = 2;
    const ZERO: Self = [bf16::ZERO; 2];

    fn transpose(bodies: &'static Bodies, square: &mut [[Self; 16]; 16]) {
        let bits = |[low, high]: Self| {
            let ([a, b], [c, d]) = (low.to_le_bytes(), high.to_le_bytes());
            u32::from_le_bytes([a, b, c, d])
        };
        let pair = |bits: u32| {
            let [a, b, c, d] = bits.to_le_bytes();
            [[a, b], [c, d]].map(bf16::from_le_bytes)
        };
        transpose_bits(bodies, square, bits, pair);
    }
}

/// Bytes without signs.
impl Lane for [u8; 4] {
    const VALUES: usize = 4;
    const ZERO: Self = [0; 4];

    fn transpose(bodies: &'static Bodies, square: &mut [[Self; 16]; 16]) {
        transpose_bits(bodies, square, u32::from_le_bytes, u32::to_le_bytes);
    }
}

/// Turns a square whose lanes are anything: its bits travel as floats, which are moved alone.
fn transpose_bits<L: Copy>(
    bodies: &'static Bodies,
    square: &mut [[L; 16]; 16],
    to_bits: impl Fn(L) -> u32,
    from_bits: impl Fn(u32) -> L,
) {
    let mut floats = square.map(|row| row.map(|lane| f32::from_bits(to_bits(lane))));
    (bodies.transpose)(&mut floats);
    *square = floats.map(|row| row.map(|float| from_bits(float.to_bits())));
}

/// For values and weights in bfloat16 alone.
impl Term for Pair {
    const SLIVER: usize = SLIVER;

    fn lay_out(_: &'static Bodies, values: Values<'_>, to: &mut [Self]) {
        let Values::Bf16(values) = values else { unreachable!("pairs are of bfloat16") };
        let (pairs, rest) = values.as_chunks();
        to[..pairs.len()].copy_from_slice(pairs);
        if let [last] = rest {
            to[pairs.len()] = [*last, bf16::ZERO];
        }
    }

    fn decode<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    ) {
        if let Some(decode) = bodies.decode_pairs.filter(|_| weight.chunks_have_scales()) {
            return (decode.along)(weight, rows, columns, panel);
        }
        let row = terms::<Self>(columns.len()).max(1);
        for (row, to) in rows.zip(panel.chunks_exact_mut(row)) {
            let first = row * weight.cols + columns.start;
            let (values, padding) = to.as_flattened_mut().split_at_mut(columns.len());
            weight.decode(bodies, first, values);
            padding.fill(bf16::ZERO);
        }
    }

    fn decode_down<T: Element>(
        weight: &Weight<'_>,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [Self],
    ) {
        if let Some(decode) = bodies.decode_pairs.filter(|_| weight.chunks_have_scales()) {
            return (decode.down)(weight, rows, columns, panel);
        }
        let mut room = [vec![bf16::ZERO; columns.len()], vec![bf16::ZERO; columns.len()]];
        let mut pairs = vec![Self::ZERO; columns.len()];
        for (i, row) in rows.clone().step_by(2).enumerate() {
            for (row, values) in (row..row + 2).zip(&mut room) {
                if row < rows.end {
                    weight.decode(bodies, row * weight.cols + columns.start, values);
                } else {
                    values.fill(bf16::ZERO);
                }
            }
            for ((to, first), second) in pairs.iter_mut().zip(&room[0]).zip(&room[1]) {
                *to = [*first, *second];
            }
            scatter(&pairs, terms::<Self>(rows.len()), i, panel);
        }
    }
}
