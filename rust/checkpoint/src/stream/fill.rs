//! The values of a chunk, as the passes want them.

use std::ops::Range;

use qkern_codec::Values;

use super::job::{Dtype, Target};
use super::values::{widened, CodeBuffer, ValueBuffer};
use super::weight::{WeightRun, CHUNK};
use crate::error::CheckpointError;

/// Where the values of a chunk are put.
#[derive(Default)]
pub(super) struct ReadBuffers {
    values: ValueBuffer,
    wide: Vec<f32>,
    turned: Vec<f32>,
    scratch: CodeBuffer,
}

/// What was put there.
pub(super) struct Filled {
    at: Room,
    range: Range<usize>,
    pub(super) squared_delta: f64,
}

enum Room {
    Values(Dtype),
    Wide,
    Turned,
}

impl ReadBuffers {
    pub(super) fn values(&self, filled: &Filled) -> Values<'_> {
        let range = filled.range.clone();
        match filled.at {
            Room::Values(dtype) => self.values.values(dtype, range),
            Room::Wide => Values::F32(&self.wide[range]),
            Room::Turned => Values::F32(&self.turned[range]),
        }
    }
}

impl WeightRun<'_> {
    /// Reads values: as they are, or decoded to `dtype`, or widened with the adapter's part added.
    /// Returns the sum of that one's squares, too.
    pub(super) fn read<'b>(
        &self,
        places: &Range<usize>,
        dtype: Dtype,
        read: &'b mut ReadBuffers,
    ) -> Result<(Values<'b>, f64), CheckpointError> {
        let filled = self.fill(places, dtype, read)?;
        Ok((read.values(&filled), filled.squared_delta))
    }

    /// The same, to be looked at by [`ReadBuffers::values`].
    pub(super) fn fill(
        &self,
        places: &Range<usize>,
        dtype: Dtype,
        read: &mut ReadBuffers,
    ) -> Result<Filled, CheckpointError> {
        match (&self.weight.target, self.weight.transposed) {
            (Target::Quantized(_), Some(rows)) => self.fill_turned(places, rows, dtype, read),
            _ => self.fill_rows(places, dtype, read),
        }
    }

    /// The same of values that lie as they will be written.
    fn fill_rows(
        &self,
        places: &Range<usize>,
        dtype: Dtype,
        read: &mut ReadBuffers,
    ) -> Result<Filled, CheckpointError> {
        let ReadBuffers { values, wide, scratch, .. } = read;
        let delta = self.weight.delta.as_ref();
        let dtype = delta.map_or(dtype, |delta| delta.base);
        let (dtype, range) = self.reader().read(places.clone(), dtype, values, scratch)?;
        let Some(delta) = delta else {
            return Ok(Filled { at: Room::Values(dtype), range, squared_delta: 0.0 });
        };
        let sums = widened(values.values(dtype, range), wide);
        let squared_delta = delta.add(places, self.weight.row, sums);
        Ok(Filled { at: Room::Wide, range: 0..places.len(), squared_delta })
    }

    /// The same of a whole matrix, its columns as rows.
    fn fill_turned(
        &self,
        places: &Range<usize>,
        rows: usize,
        dtype: Dtype,
        read: &mut ReadBuffers,
    ) -> Result<Filled, CheckpointError> {
        let (row, mut squared_delta) = (self.weight.row, 0.0);
        let mut turned = std::mem::take(&mut read.turned);
        turned.resize(places.len(), 0.0);
        let most = stripe(row, size_of::<f32>());
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            let start = places.start + first * row;
            let filled = self.fill_rows(&(start..start + count * row), dtype, read)?;
            squared_delta += filled.squared_delta;
            let mut wide = std::mem::take(&mut read.wide);
            let values = match filled.at {
                Room::Values(_) => &*widened(read.values(&filled), &mut wide),
                _ => &wide[filled.range.clone()],
            };
            for (column, to) in turned.chunks_mut(rows).enumerate() {
                for (i, to) in to[first..first + count].iter_mut().enumerate() {
                    *to = values[i * row + column];
                }
            }
            read.wide = wide;
        }
        read.turned = turned;
        Ok(Filled { at: Room::Turned, range: 0..places.len(), squared_delta })
    }
}

/// Rows of `row` values that are transposed at a time: their columns fill a cache line of the
/// result, or they a chunk.
pub(super) fn stripe(row: usize, size: usize) -> usize {
    /// Bytes of a cache line.
    const LINE: usize = 64;
    (CHUNK / row).clamp(1, LINE / size)
}
