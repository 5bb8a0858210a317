//! Which of 256 ascending values is nearest.

/// The bounds between 256 values, with cells over [-1, 1] that say where to start looking.
///
/// The cell of a value is a monotone function of it. So all bounds in lower cells lie below the
/// value, all in higher cells above it, and only those of its own cell are compared. Cells are
/// narrower near zero, as the values of the dynamic code are: none holds two of its bounds.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// The 255 bounds, then infinity.
    bounds: [f32; 256],
    /// The values themselves.
    table: [f32; 256],
    /// How many bounds lie in the cells below each cell; three more, since gathers read 4 bytes.
    below: [u8; CELLS + 3],
    /// The largest number of bounds in a cell.
    most: usize,
    /// Scales that are so many times the second-level scale survive, whatever their codes.
    certain: f32,
}

/// Bits of a magnitude that its cell does not depend on: 64 cells a power of two.
pub(super) const DROPPED: u32 = 17;
/// Smaller magnitudes than 2^-24 share a cell.
pub(super) const LOWEST: i32 = (127 - 24) << (23 - DROPPED);
/// Cells of one sign; the last is that of 1.
pub(super) const SIDE: usize = (127 << (23 - DROPPED)) - LOWEST as usize + 1;
const CELLS: usize = 2 * SIDE;

impl Search {
    /// Takes bounds that ascend and are not NaN.
    pub(super) fn new(table: &[f32; 256], bounds: &[f32; 255]) -> Self {
        let (table, below) = (*table, [255; CELLS + 3]);
        let certain = certain(&table);
        let mut search = Self { bounds: [f32::INFINITY; 256], table, below, most: 0, certain };
        search.bounds[..255].copy_from_slice(bounds);
        let (mut start, mut inside) = (0, 0);
        for (i, &bound) in bounds.iter().enumerate() {
            let end = cell(bound + 0.0) + 1; // zero without a sign: equals have one cell
            inside = if end == start { inside + 1 } else { 1 };
            search.most = search.most.max(inside);
            search.below[start..end].fill(i as u8); // up to its own cell it is not below
            start = end;
        }
        search
    }

    /// Whether scales of magnitude `least` or more survive beside `nested`, by what is known without
    /// their codes.
    #[inline]
    pub(super) fn all_survive(&self, least: f32, nested: f32) -> bool {
        least >= f32::MIN_POSITIVE && least >= self.certain * nested
    }

    pub(super) fn table(&self) -> &[f32; 256] {
        &self.table
    }

    pub(super) fn bounds(&self) -> &[f32; 256] {
        &self.bounds
    }

    pub(super) fn below(&self) -> &[u8; CELLS + 3] {
        &self.below
    }

    /// The largest number of bounds in a cell.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// How many bounds lie strictly below each value, which must be in [-1, 1] but for some ulps;
    /// any number for NaN.
    pub(super) fn count_below(&self, values: &[f32], counts: &mut [u8]) {
        for (count, &value) in counts.iter_mut().zip(values) {
            // Without a branch: whether a bound is passed cannot be predicted.
            let first = self.below[cell(value)];
            *count = first + u8::from(self.bounds[usize::from(first)] < value);
        }
        for _ in 1..self.most {
            for (count, &value) in counts.iter_mut().zip(values) {
                *count += u8::from(self.bounds[usize::from(*count)] < value);
            }
        }
    }
}

/// A scale may be off by 1/8 of itself. The nearest value is off by half a gap of the table, or by
/// what lies between its ends and those of [-1, 1]; a hundredth more is much more than what four
/// roundings take.
fn certain(table: &[f32; 256]) -> f32 {
    let gaps = table.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0);
    let ends = [(-1.0 - table[0]).abs(), (1.0 - table[255]).abs()];
    8.0 * 1.01 * gaps.chain(ends).fold(0.0, f32::max)
}

/// By the sign, the exponent and the first six bits after it.
#[inline]
fn cell(value: f32) -> usize {
    let magnitude = (value.to_bits() & 0x7fff_ffff) >> DROPPED;
    let place = (magnitude as i32 - LOWEST).clamp(0, SIDE as i32 - 1);
    let sign = value.to_bits() as i32 >> 31; // 0 or -1, which turns `place` into `-1 - place`
    ((place ^ sign) + SIDE as i32) as usize
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
        let search = Search::new(&[0.0; 256], &bounds);
        let near = bounds.into_iter().flat_map(|b| [b, b.next_up(), b.next_down()]);
        let grid = (-4096..=4096_i16).map(|i| f32::from(i) / 4096.0);
        for value in near.chain(grid).filter(|v| v.abs() <= 1.0 + 4.0 * f32::EPSILON) {
            let below = bounds.iter().filter(|&&bound| bound < value).count();
            let mut found = [0];
            search.count_below(&[value], &mut found);
            assert_eq!(usize::from(found[0]), below, "at {value:e}");
        }
    }
}
