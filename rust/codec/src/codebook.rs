//! A table of 16 values, prepared for finding the nearest one.
//!
//! The code of a scaled value is found among the values sorted by size: it is the number of
//! midpoints between neighbours that lie strictly below it, so a tie goes to the lower value.
//! A permutation leads back to the place in the table as given.

use std::cmp::Ordering;

use crate::error::CodecError;

/// A 16-entry code table with its decision bounds.
#[derive(Clone, Debug)]
pub struct Codebook {
    sorted: [f32; 16],
    bounds: [f32; 15],
    order: [u8; 16],
    uniform: Option<UniformBins>,
}

impl Codebook {
    /// Prepares a table of any 16 finite values in any order.
    ///
    /// # Errors
    /// [`CodecError::TableNotFinite`] if a value is NaN or infinite.
    pub fn new(table: &[f32; 16]) -> Result<Self, CodecError> {
        check_table(table)?;
        let mut order: [u8; 16] = core::array::from_fn(|i| i as u8);
        let value = |i: u8| table[usize::from(i)];
        order.sort_by(|&a, &b| value(a).partial_cmp(&value(b)).unwrap_or(Ordering::Equal));
        let sorted = order.map(value);
        let midpoint = |i: usize| (sorted[i] + sorted[i + 1]) / 2.0;
        let bounds: [f32; 15] = core::array::from_fn(|i| unclamped(midpoint(i)));
        let in_order = order.is_sorted();
        let uniform = if in_order { UniformBins::new(&bounds) } else { None };
        Ok(Self { sorted, bounds, order, uniform })
    }

    /// The values in ascending order.
    pub(crate) fn sorted(&self) -> &[f32; 16] {
        &self.sorted
    }

    /// Whether the negative of every value is a value, so that the sign of a scale changes nothing.
    pub(crate) fn is_symmetric(&self) -> bool {
        self.sorted.iter().zip(self.sorted.iter().rev()).all(|(a, b)| *a == -*b)
    }

    /// The 15 midpoints of the sorted values, ascending, for scaled values that are not clamped
    /// to [-1, 1] (see [`unclamped`]).
    pub(crate) fn bounds(&self) -> &[f32; 15] {
        &self.bounds
    }

    /// The code of the scaled value 0.0, which pads an odd count.
    pub(crate) fn zero_code(&self) -> u8 {
        let below = self.bounds.iter().filter(|&&bound| bound < 0.0).count();
        self.order[below]
    }

    /// Place in the table as given of each sorted value.
    pub(crate) fn order(&self) -> &[u8; 16] {
        &self.order
    }

    /// The shortcut to the index of a scaled value, if this table is sorted and permits it.
    pub(crate) fn uniform(&self) -> Option<&UniformBins> {
        self.uniform.as_ref()
    }
}

/// The bound that has on any value the effect that `bound` has on the value clamped to [-1, 1].
///
/// Rounding can carry a scaled value past 1 by some ulps.
fn unclamped(bound: f32) -> f32 {
    if bound >= 1.0 {
        f32::INFINITY
    } else if bound < -1.0 {
        f32::NEG_INFINITY
    } else {
        bound
    }
}

/// Refuses a table that holds NaN or infinity.
pub(crate) fn check_table(table: &[f32; 16]) -> Result<(), CodecError> {
    match table.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(CodecError::TableNotFinite { index, value: table[index] }),
        None => Ok(()),
    }
}

/// Bins of equal width, each with at most one bound: one lookup and one comparison give the index.
///
/// `bin(s) = round(s * scale)`, taken from the low bits of `fma(s, scale, MAGIC)`. Rounding is
/// monotone, so a bin holds an interval of floats. All bounds of lower bins lie below that
/// interval and all bounds of higher bins above it; with at most one bound inside, the index is
/// `base[bin] + (s > threshold[bin])`, exactly.
#[derive(Clone, Debug)]
pub(crate) struct UniformBins {
    /// Bins per unit.
    pub(crate) scale: f32,
    /// The bound in each bin, or infinity; bin `k` is at `k & 31`.
    pub(crate) threshold: [f32; 32],
    /// How many bounds lie in lower bins.
    pub(crate) base: [u32; 32],
}

impl UniformBins {
    /// `1.5 * 2^23`: adding it leaves a float's nearest integer in its low bits.
    pub(crate) const MAGIC: f32 = 12_582_912.0;

    /// Bins for ascending `bounds` if some width keeps them apart.
    ///
    /// Bounds must be finite, that is, lie in [-1, 1).
    fn new(bounds: &[f32; 15]) -> Option<Self> {
        if !bounds.iter().all(|bound| bound.is_finite()) {
            return None;
        }
        // The widest range of bins that fits 5 bits ends below 15.5.
        [15.4, 15.2, 15.0, 14.5, 14.0, 13.0, 12.0]
            .into_iter()
            .find_map(|scale| Self::with_scale(bounds, scale))
    }

    fn with_scale(bounds: &[f32; 15], scale: f32) -> Option<Self> {
        let mut bins = Self { scale, threshold: [f32::INFINITY; 32], base: [0; 32] };
        let places = bounds.map(|bound| bins.bin(bound));
        if places.windows(2).any(|p| p[0] == p[1]) {
            return None;
        }
        for bin in -15..=15_i32 {
            let slot = (bin & 31) as usize;
            bins.base[slot] = places.iter().filter(|&&place| place < bin).count() as u32;
            if let Some(i) = places.iter().position(|&place| place == bin) {
                bins.threshold[slot] = bounds[i];
            }
        }
        Some(bins)
    }

    fn bin(&self, scaled: f32) -> i32 {
        let low_bits = scaled.mul_add(self.scale, Self::MAGIC).to_bits() & 31;
        ((low_bits << 27) as i32) >> 27
    }

    /// The index of a scaled value, as the SIMD bodies compute it.
    #[cfg(test)]
    fn index(&self, scaled: f32) -> u32 {
        let slot = (self.bin(scaled) & 31) as usize;
        self.base[slot] + u32::from(scaled > self.threshold[slot])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const NF4: [f32; 16] = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ];

    pub(crate) fn fp4() -> [f32; 16] {
        let m = [0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25];
        core::array::from_fn(|i| if i < 8 { m[i] } else { 0.0 - m[i - 8] })
    }

    #[test]
    fn nf4_is_sorted_and_has_uniform_bins() {
        let code = Codebook::new(&NF4).unwrap();
        assert_eq!(code.order, core::array::from_fn(|i| i as u8));
        assert_eq!(code.zero_code(), 7);
        assert_eq!(code.bounds[0].to_bits(), 0xbf591cd8);
        assert_eq!(code.bounds[14].to_bits(), 0x3f5c89da);
        assert!(code.uniform().is_some());
    }

    #[test]
    fn fp4_is_permuted_and_has_none() {
        let code = Codebook::new(&fp4()).unwrap();
        assert_eq!(code.order, [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]);
        assert_eq!(code.zero_code(), 0);
        assert!(code.uniform().is_none());
    }

    #[test]
    fn bins_agree_with_counting_at_every_bound_and_in_between() {
        let code = Codebook::new(&NF4).unwrap();
        let bins = code.uniform().unwrap();
        let check = |s: f32| {
            let below = code.bounds.iter().filter(|&&b| b < s).count() as u32;
            assert_eq!(bins.index(s), below, "at {s:e}");
        };
        for bound in code.bounds {
            for s in [bound, bound.next_up(), bound.next_down()] {
                check(s);
            }
        }
        for k in -16_i32..=16 {
            let edge = ((k as f32 + 0.5) / bins.scale).clamp(-1.0, 1.0);
            let mut s = edge - 8.0 * f32::EPSILON;
            while s < edge + 8.0 * f32::EPSILON {
                check(s);
                s = s.next_up();
            }
        }
        for i in -100_000..=100_000_i32 {
            check(i as f32 / 100_000.0);
        }
        for s in [-0.0, f32::MIN_POSITIVE, 1e-45, -1e-45, 1.0 + f32::EPSILON, -1.0 - f32::EPSILON] {
            check(s);
        }
    }

    #[test]
    fn a_table_with_a_bound_beyond_one_has_no_bins() {
        let mut table = NF4;
        table[15] = 1.5; // the last bound becomes 1.11
        let code = Codebook::new(&table).unwrap();
        assert_eq!(code.bounds[14], f32::INFINITY);
        assert!(code.uniform().is_none());
    }

    #[test]
    fn equal_values_keep_their_order() {
        let code = Codebook::new(&[0.0; 16]).unwrap();
        assert_eq!(code.order, core::array::from_fn(|i| i as u8));
        assert!(code.uniform().is_none());
    }

    #[test]
    fn a_table_with_nan_is_refused() {
        let mut table = NF4;
        table[3] = f32::INFINITY;
        let error = Codebook::new(&table).unwrap_err();
        assert_eq!(error, CodecError::TableNotFinite { index: 3, value: f32::INFINITY });
    }
}
