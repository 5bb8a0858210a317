//! The pass of a weight that becomes values of a dtype.

use std::ops::Range;

use qkern_codec::Values;

use super::fill::{stripe, ReadBuffers};
use super::job::{Dtype, Errors, Span};
use super::values::{bytes_of, has_infinite, is, round, widen, ValueBuffer};
use super::weight::{Buffers, WeightRun};
use crate::error::CheckpointError;

impl WeightRun<'_> {
    /// Writes values as `to`.
    pub(super) fn round(
        &self,
        to: Dtype,
        at: Span,
        places: &Range<usize>,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { read, rounded, wide, again, .. } = buffers;
        let (exact, result, squared_delta) = self.rounded(to, places, read, wide, rounded)?;
        if let (Some(_), Values::F32(exact)) = (&self.weight.delta, exact) {
            let errors = Errors::between(exact, widen(result, again));
            self.state().errors[chunk] = Errors { squared_delta, ..errors };
        }
        let offset = at.offset + (places.start * to.size()) as u64;
        self.write(&self.files.outputs[at.file], bytes_of(result), offset, chunk)
    }

    /// Values as they are, the same as `to`, and the sum of squares of what was added.
    fn rounded<'b>(
        &self,
        to: Dtype,
        places: &Range<usize>,
        read: &'b mut ReadBuffers,
        wide: &'b mut Vec<f32>,
        rounded: &'b mut ValueBuffer,
    ) -> Result<(Values<'b>, Values<'b>, f64), CheckpointError> {
        let mut filled = self.fill(places, to, read)?;
        if has_infinite(read.values(&filled)) {
            // Codes were decoded to the target's dtype: where it was too small for them.
            filled = self.fill(places, Dtype::F32, read)?;
        }
        let (exact, squared_delta) = (read.values(&filled), filled.squared_delta);
        if is(exact, to) {
            return Ok((exact, exact, squared_delta));
        }
        let (values, overflow) = round(widen(exact, wide), to, rounded);
        if let Some(index) = overflow {
            let (name, index) = (self.weight.name.clone(), places.start + index);
            return Err(CheckpointError::Overflow { name, index, dtype: to.name() });
        }
        Ok((exact, values, squared_delta))
    }

    /// Writes one matrix as `to`, its columns as rows.
    pub(super) fn transpose(
        &self,
        to: Dtype,
        at: Span,
        rows: usize,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let Buffers { bytes, read, rounded, wide, again, .. } = buffers;
        let (row, size, places) = (self.weight.row, to.size(), self.places(chunk));
        bytes.resize(places.len() * size, 0);
        let mut errors = Errors::default();
        let most = stripe(row, size);
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            let start = places.start + first * row;
            let part = start..start + count * row;
            let (exact, values, squared) = self.rounded(to, &part, read, wide, rounded)?;
            if let (Some(_), Values::F32(exact)) = (&self.weight.delta, exact) {
                let found = Errors::between(exact, widen(values, again));
                errors = Errors::sum(&[errors, Errors { squared_delta: squared, ..found }]);
            }
            let values = bytes_of(values);
            for column in 0..row {
                let to = &mut bytes[(column * rows + first) * size..][..count * size];
                for (i, to) in to.chunks_exact_mut(size).enumerate() {
                    to.copy_from_slice(&values[(i * row + column) * size..][..size]);
                }
            }
        }
        self.state().errors[chunk] = errors;
        let offset = at.offset + (places.start * size) as u64;
        self.write(&self.files.outputs[at.file], bytes, offset, chunk)
    }
}
