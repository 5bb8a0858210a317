//! Which of 256 ascending values is nearest.

/// The bounds between 256 values, with a grid over [-1, 1] that says where to start looking.
///
/// The cell of a value is a monotone function of it. So all bounds in lower cells lie below the
/// value, all in higher cells above it, and only the few of its own cell are compared.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// The 255 bounds, then infinity.
    bounds: [f32; 256],
    /// How many bounds lie in the cells below each cell.
    below: [u8; CELLS],
}

/// `cell` gives 0..=256 for what lies in [-1, 1]; more, so that 9 bits are always a cell.
const CELLS: usize = 512;

impl Search {
    /// Takes bounds that ascend and are not NaN.
    pub(super) fn new(bounds: &[f32; 255]) -> Self {
        let mut search = Self { bounds: [f32::INFINITY; 256], below: [255; CELLS] };
        search.bounds[..255].copy_from_slice(bounds);
        let mut start = 0;
        for (i, bound) in bounds.iter().enumerate() {
            let end = cell(bound.clamp(-1.0, 1.0)) + 1;
            search.below[start..end].fill(i as u8); // up to its own cell it is not below
            start = end;
        }
        search
    }

    /// How many bounds lie strictly below a value, which must be in [-1, 1] but for some ulps; any
    /// number for NaN.
    #[inline]
    pub(super) fn count_below(&self, value: f32) -> u8 {
        let first = self.below[cell(value)];
        // Without a branch: whether the first bound of a cell is passed cannot be predicted.
        let mut count = first + u8::from(self.bounds[usize::from(first)] < value);
        while self.bounds[usize::from(count)] < value {
            count += 1;
        }
        count
    }
}

/// Rounds `128 * (value + 1)` to an integer by adding `2^23`.
#[inline]
fn cell(value: f32) -> usize {
    (value * 128.0 + (8_388_608.0 + 128.0)).to_bits() as usize % CELLS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bounds() {
        let edges = [
            f32::NEG_INFINITY,
            -1.5,
            -1.0,
            -0.5,
            -1e-3,
            -1e-4,
            0.0,
            1e-4,
            2e-4,
            0.3,
            0.3,
            1.0,
            1.0,
            1.7,
            f32::INFINITY,
        ];
        let mut bounds = core::array::from_fn(|i| edges[i % edges.len()] * (i / 15) as f32 / 16.0);
        bounds = bounds.map(|bound: f32| if bound.is_nan() { 0.0 } else { bound });
        bounds.sort_by(f32::total_cmp);
        let search = Search::new(&bounds);
        let near = bounds.into_iter().flat_map(|b| [b, b.next_up(), b.next_down()]);
        let grid = (-4096..=4096_i16).map(|i| f32::from(i) / 4096.0);
        for value in near.chain(grid).filter(|v| v.abs() <= 1.0 + 4.0 * f32::EPSILON) {
            let below = bounds.iter().filter(|&&bound| bound < value).count();
            assert_eq!(usize::from(search.count_below(value)), below, "at {value:e}");
        }
    }
}
