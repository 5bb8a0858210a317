//! A row-major matrix as strips of columns: what a thread writes when it owns some out-features.

use std::ops::Range;

/// Columns `columns` of every row of a matrix.
pub(crate) struct Strip<'a, T> {
    pub(crate) columns: Range<usize>,
    pub(crate) rows: Vec<&'a mut [T]>,
}

/// Splits a matrix of rows of `cols` values into strips of `width` columns; the last may be
/// narrower.
pub(crate) fn split<T>(matrix: &mut [T], cols: usize, width: usize) -> Vec<Strip<'_, T>> {
    let starts = (0..cols).step_by(width);
    let count = matrix.len().checked_div(cols).unwrap_or(0);
    let mut strips: Vec<_> = starts
        .map(|start| Strip {
            columns: start..(start + width).min(cols),
            rows: Vec::with_capacity(count),
        })
        .collect();
    for row in matrix.chunks_mut(cols.max(1)) {
        for (strip, part) in strips.iter_mut().zip(row.chunks_mut(width)) {
            strip.rows.push(part);
        }
    }
    strips
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_one_strip() {
        for (rows, cols, width) in [(1, 1, 64), (3, 64, 64), (5, 130, 64), (0, 7, 4), (2, 0, 4)] {
            let mut matrix = vec![0; rows * cols];
            for (i, strip) in split(&mut matrix, cols, width).into_iter().enumerate() {
                assert_eq!(strip.rows.len(), rows);
                assert_eq!(strip.columns.start, i * width);
                for row in strip.rows {
                    assert_eq!(row.len(), strip.columns.len());
                    for x in row.iter_mut() {
                        *x += 1;
                    }
                }
            }
            assert!(matrix.iter().all(|&x| x == 1), "{rows} x {cols} by {width}");
        }
    }
}
