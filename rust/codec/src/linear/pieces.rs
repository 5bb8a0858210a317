//! Pieces of a weight as floats: some of the rows, some of the columns.

use std::ops::Range;

use crate::linear::weight::{Codes, Weight};
use crate::scales::Scales;
use crate::simd::Bodies;
use crate::values::{Element, Stores, ValuesMut};

/// Lengths that every body decodes: blocks, and parts of blocks.
const STEP: usize = 32;

/// Values of 16 bits that are widened at a time.
const ROOM: usize = 1024;

impl Weight<'_> {
    /// Values of a row that decode by themselves: columns are best cut between these.
    pub(crate) fn unit(&self) -> usize {
        if self.rows_are_blocks() && self.blocksize.is_multiple_of(STEP) {
            // 512 divides larger blocks, but for rows of int8, which have any length.
            let divides = |unit: &usize| self.blocksize.is_multiple_of(*unit);
            if self.blocksize <= 512 {
                self.blocksize
            } else {
                [512, 256, 128, 64].into_iter().find(divides).unwrap_or(STEP)
            }
        } else {
            64
        }
    }

    /// Writes the values of a piece, (rows, columns), rounded to `T` and widened again.
    pub(crate) fn widened_piece<T: Element>(
        &self,
        bodies: &'static Bodies,
        rows: Range<usize>,
        columns: Range<usize>,
        panel: &mut [f32],
    ) {
        let mut room = [T::ZERO; ROOM];
        for (row, panel) in rows.zip(panel.chunks_exact_mut(columns.len().max(1))) {
            let mut first = row * self.cols + columns.start;
            if let Some(panel) = T::floats(panel) {
                self.decode(bodies, first, panel);
                continue;
            }
            for floats in panel.chunks_mut(ROOM) {
                let values = &mut room[..floats.len()];
                self.decode(bodies, first, values);
                (bodies.widen)(T::values(values), floats);
                first += floats.len();
            }
        }
    }

    /// Writes the values from `first` on.
    pub(crate) fn decode<T: Element>(&self, bodies: &'static Bodies, first: usize, out: &mut [T]) {
        let last = first + out.len();
        let blocks = first / self.blocksize..last.div_ceil(self.blocksize);
        if out.is_empty() {
            return;
        }
        let mut few = [0.0; 64];
        let mut many = Vec::new();
        let scales = match self.scales {
            Scales::Plain(scales) => &scales[blocks.clone()],
            Scales::Nested { .. } => {
                let room = if blocks.len() <= few.len() {
                    &mut few[..blocks.len()]
                } else {
                    many.resize(blocks.len(), 0.0);
                    &mut many[..]
                };
                // Vectors of scales cost more than a few.
                if room.len() < 16 {
                    self.scales.write(blocks.start, room);
                } else {
                    (bodies.write_scales)(&self.scales, blocks.start, room);
                }
                &*room
            }
        };
        let aligned = |at: usize, to: usize| at.is_multiple_of(to);
        if aligned(self.blocksize, STEP)
            && aligned(first, self.blocksize)
            && aligned(last, self.blocksize)
        {
            self.whole(bodies, first..last, scales, self.blocksize, T::values_mut(out));
        } else if scales.len() == 1 && aligned(first, STEP) && aligned(last, STEP) {
            self.whole(bodies, first..last, scales, out.len(), T::values_mut(out));
        // part of a block
        } else {
            let from = blocks.start * self.blocksize;
            let until = (blocks.end * self.blocksize).min(self.rows * self.cols);
            let mut room = vec![T::ZERO; until - from];
            self.dequantize_range(bodies, from..until, scales, T::values_mut(&mut room));
            out.copy_from_slice(&room[first - from..last - from]);
        }
    }

    /// Blocks of `blocksize` values, without the checks and threads that a call of its own has.
    fn whole(
        &self,
        bodies: &'static Bodies,
        range: Range<usize>,
        scales: &[f32],
        blocksize: usize,
        out: ValuesMut<'_>,
    ) {
        match self.codes {
            Codes::FourBit { packed, table } => {
                let packed = &packed[range.start / 2..range.end / 2];
                (bodies.dequantize_4bit)(packed, scales, table, blocksize, Stores::Cached, out);
            }
            Codes::Int8(codes) => {
                (bodies.dequantize_int8)(&codes[range], scales, blocksize, Stores::Cached, out);
            }
        }
    }
}

/// Cuts `0..len` into pieces of about `target`, of whole units but for the last.
pub(crate) fn cut(len: usize, target: usize, unit: usize) -> Vec<Range<usize>> {
    let pieces = len.div_ceil(target).max(1);
    let units = len.div_ceil(pieces).div_ceil(unit).max(1);
    let size = units * unit;
    (0..len).step_by(size).map(|start| start..(start + size).min(len)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::tests::NF4;
    use crate::scales::Scales;
    use crate::testing::{Random, Weights};
    use crate::{available, Engine};

    fn check<T: Element>(weight: &Weight<'_>, like: &mut Weights) {
        let engine = Engine::new(available()[0], 1);
        let out = like.values_mut();
        weight.dequantize_rows(engine.bodies, 0..weight.rows, out);
        let all = like.widened();
        for bodies in available() {
            for (rows, columns) in
                [(0..3, 0..weight.cols), (1..3, 0..64), (2..3, 32..96), (1..2, 64..97)]
            {
                let columns = columns.start.min(weight.cols)..columns.end.min(weight.cols);
                let mut panel = vec![f32::NAN; rows.len() * columns.len()];
                weight.widened_piece::<T>(bodies, rows.clone(), columns.clone(), &mut panel);
                let row = |row: usize| &all[row * weight.cols..][columns.clone()];
                let expected: Vec<f32> = rows.clone().flat_map(row).copied().collect();
                assert_eq!(panel, expected, "{rows:?} {columns:?}, {}", bodies.name());
            }
        }
    }

    fn check_dtypes(weight: &Weight<'_>) {
        let [mut f32s, mut f16s, mut bf16s] = Weights::room(weight.rows * weight.cols);
        check::<f32>(weight, &mut f32s);
        check::<half::f16>(weight, &mut f16s);
        check::<half::bf16>(weight, &mut bf16s);
    }

    #[test]
    fn pieces_are_parts_of_the_dequantized_weight() {
        let mut random = Random(1);
        for (cols, blocksize) in [(256_usize, 64), (4096, 1024), (100, 64), (33, 32), (8192, 4096)]
        {
            let rows = 3;
            let bytes = random.bytes((rows * cols).div_ceil(2));
            let codes: Vec<i8> = random.bytes(rows * cols).iter().map(|&b| b as i8).collect();
            let mut scales = |blocksize: usize| -> Vec<f32> {
                (0..(rows * cols).div_ceil(blocksize)).map(|_| random.unit()).collect()
            };
            let (absmax, of_rows) = (scales(blocksize), scales(cols));
            let four = Codes::FourBit { packed: &bytes, table: &NF4 };
            let int8 = Codes::Int8(&codes);
            for (codes, scales, blocksize) in
                [(four, &absmax, blocksize), (int8, &absmax, blocksize), (int8, &of_rows, cols)]
            {
                let scales = Scales::Plain(scales);
                check_dtypes(&Weight { codes, scales, blocksize, rows, cols });
            }
        }
    }

    #[test]
    fn cuts_are_even_and_cover_everything() {
        for (len, target, unit) in
            [(4096, 1024, 64), (64, 1024, 64), (100, 1024, 64), (14336, 1024, 512)]
        {
            let pieces = cut(len, target, unit);
            let ends = pieces.iter().map(|piece| piece.end);
            let starts = pieces.iter().map(|piece| piece.start);
            assert!(starts.eq([0].into_iter().chain(ends).take(pieces.len())));
            assert_eq!(pieces.last().unwrap().end, len);
            for piece in &pieces[..pieces.len() - 1] {
                assert_eq!(piece.len() % unit, 0);
            }
        }
        assert!(cut(0, 8, 8).is_empty());
    }
}
