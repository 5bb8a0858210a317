//! The product of an adapter's factors, added to the values of a chunk.

use std::ops::Range;

use super::job::Delta;

impl Delta {
    /// The rank, for rows of `row` values.
    pub(super) fn rank(&self, row: usize) -> usize {
        self.a.len() / row.max(1) / self.matrices.max(1)
    }

    /// Adds what belongs to the values at `places` of rows of `row` values; the sum of its squares.
    pub(super) fn add(&self, places: &Range<usize>, row: usize, values: &mut [f32]) -> f64 {
        /// Columns at a time: their sums stay in the innermost cache.
        const COLUMNS: usize = 1024;
        let (rank, mut sums) = (self.rank(row), [0.0; COLUMNS]);
        // Rows of a matrix; without a rank there is nothing to find in it.
        let rows = (self.b.len() / rank.max(1) / self.matrices).max(1);
        let (mut at, mut squared) = (places.start, 0.0);
        let mut rest = values;
        while at < places.end {
            let (i, first) = (at / row, at % row);
            let count = (row - first).min(places.end - at).min(COLUMNS);
            let sums = &mut sums[..count];
            sums.fill(0.0);
            let matrix = i / rows * rank;
            for r in 0..rank {
                let factor = self.b[i * rank + r];
                let a = &self.a[(matrix + r) * row + first..][..count];
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
            }
            let (here, others) = rest.split_at_mut(count);
            here.iter_mut().zip(&*sums).for_each(|(value, sum)| *value += sum);
            squared += sums.iter().map(|sum| f64::from(*sum) * f64::from(*sum)).sum::<f64>();
            rest = others;
            at += count;
        }
        squared
    }
}
