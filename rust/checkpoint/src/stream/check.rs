//! Jobs that cannot be done are refused before any is begun.

use qkern_codec::{MAX_BLOCKSIZE, MIN_BLOCKSIZE};

use super::job::{
    num_groups, Coded, Delta, Dtype, Format, Job, Source, Span, Stored, Target, Weight,
};
use crate::error::CheckpointError;

/// A row with one scale must fit into memory as a whole.
const LONGEST_ROW: usize = 1 << 28;
/// So must a matrix that is transposed.
const LARGEST_MATRIX: usize = 1 << 28;

impl Job {
    /// Refuses what cannot be done: a file that is not there, sizes beyond all numbers.
    pub(super) fn check(&self, inputs: usize, outputs: usize) -> Result<(), CheckpointError> {
        let wrong = match self {
            Self::Copy { nbytes, change, source, target, .. } => source
                .check(*nbytes, inputs)
                .or_else(|| target.check(nbytes.saturating_mul(change.growth()), outputs)),
            Self::Weight(weight) => weight.check(inputs, outputs),
        };
        match wrong {
            Some(what) => Err(CheckpointError::Job { name: self.name().to_owned(), what }),
            None => Ok(()),
        }
    }
}

impl Weight {
    /// What is wrong, if something is.
    fn check(&self, inputs: usize, outputs: usize) -> Option<String> {
        if self.row > LONGEST_ROW {
            return Some(format!("rows of {} values: {LONGEST_ROW} is the most", self.row));
        }
        if let Some(delta @ Delta { a, b, matrices, .. }) = &self.delta {
            let (row, rank, rows) = (self.row, delta.rank(self.row), self.numel / self.row.max(1));
            let fits = *matrices > 0
                && rows.is_multiple_of(*matrices)
                && (rank * row).checked_mul(*matrices) == Some(a.len())
                && rows.checked_mul(rank) == Some(b.len());
            if !fits {
                let (a, b) = (a.len(), b.len());
                return Some(format!(
                    "A of {a} and B of {b} values do not fit {rows} x {row} in {matrices} matrices"
                ));
            }
        }
        if let Some(rows) = self.transposed {
            let matrix =
                rows.checked_mul(self.row).filter(|size| (1..=LARGEST_MATRIX).contains(size));
            let whole = matrix.is_some_and(|size| match self.target {
                Target::Dense { .. } => self.numel.is_multiple_of(size),
                Target::Quantized(_) => self.numel == size,
            });
            if !whole {
                return Some(format!("no matrices of {rows} x {} to transpose", self.row));
            }
        }
        let dense = |dtype: &Dtype, at: &Span, files| {
            at.check((self.numel as u64).saturating_mul(dtype.size() as u64), files)
        };
        let source = match &self.source {
            Source::Dense { dtype, at } => dense(dtype, at, inputs),
            Source::Quantized(Stored { format, codes, scales, nested, .. }) => {
                format.check(self.numel, self.row, codes, scales, inputs).or_else(|| {
                    nested.check(4 * num_groups(format.num_blocks(self.numel)) as u64, inputs)
                })
            }
            Source::Blocks(blocks) => blocks.check(self, inputs),
        };
        let target = || match &self.target {
            Target::Dense { dtype, at } => dense(dtype, at, outputs),
            Target::Quantized(Coded { format, codes, scales, search, .. }) => {
                let integers = *search && format.code.is_none();
                format
                    .check(self.numel, self.transposed.unwrap_or(self.row), codes, scales, outputs)
                    .or_else(|| integers.then(|| "scales are searched for 4 bits only".to_owned()))
            }
        };
        source.or_else(target)
    }
}

impl Format {
    fn check(
        &self,
        numel: usize,
        row: usize,
        codes: &Span,
        scales: &Span,
        files: usize,
    ) -> Option<String> {
        let fits = if self.per_row {
            self.code.is_none() && self.nested_code.is_none() && self.blocksize == row
        } else {
            self.blocksize.is_power_of_two()
                && (MIN_BLOCKSIZE..=MAX_BLOCKSIZE).contains(&self.blocksize)
        };
        if !fits || self.blocksize == 0 {
            return Some(format!("blocksize {} does not fit the format", self.blocksize));
        }
        let blocks = self.num_blocks(numel) as u64;
        let bytes = match self.nested_code {
            Some(_) => blocks,
            None => blocks.saturating_mul(4),
        };
        codes.check(self.packed_size(numel) as u64, files).or_else(|| scales.check(bytes, files))
    }
}

impl Span {
    /// What is wrong with so many bytes here, if something is.
    pub(super) fn check(&self, nbytes: u64, files: usize) -> Option<String> {
        if self.file >= files {
            return Some(format!("there is no file {} among {files}", self.file));
        }
        let end = self.offset.checked_add(nbytes).filter(|end| i64::try_from(*end).is_ok());
        end.is_none().then(|| format!("{nbytes} bytes from {} on end nowhere", self.offset))
    }
}
