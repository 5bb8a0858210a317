//! NEON: 4 blocks at a time for the scales, 32 values at a time for the codes.
//!
//! 1. Indices by a binary search, in lanes of four equal bytes but for the low two bits, which say
//!    which byte of a lane it is: a table lookup by bytes then takes whole floats. Each comparison
//!    sets one more bit.
//! 2. A bit says that the value is not above the bound. So a NaN, above none and below none, gets
//!    the highest index without a case of its own.
//! 3. The bits come out inverted and in reverse; the lookup of the code puts that right.

use std::arch::aarch64::*;

use crate::codebook::Codebook;
use crate::neon::{
    absmax_bf16, absmax_f16, absmax_f32, load, prefetch, store, strip_bf16, strip_f16, strip_f32,
    Plain, STRIP,
};
use crate::quantize::scalar::at_least_smallest;
use crate::values::Values;

/// Blocks whose scales are computed together, so that none waits for the division of another.
const GROUP: usize = 4;
/// How far ahead values are fetched, in bytes.
const AHEAD: usize = 4096;

/// The input and the outputs of one call.
struct Task<'a, T> {
    values: &'a [T],
    blocksize: usize,
    packed: &'a mut [u8],
    scales: Scales<'a>,
}

/// The scales of a call, one a block.
enum Scales<'a> {
    /// To be found and written: the absmax of each block.
    Absmax(&'a mut [f32]),
    /// To be coded against.
    Given(&'a [f32]),
}

/// Quantizes whole blocks; tells whether all values were finite.
#[target_feature(enable = "neon")]
pub(crate) fn quantize(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    dispatch(values, code, blocksize, packed, Scales::Absmax(absmax))
}

/// Codes whole blocks against the scales given.
#[target_feature(enable = "neon")]
pub(crate) fn encode(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    scales: &[f32],
    packed: &mut [u8],
) {
    dispatch(values, code, blocksize, packed, Scales::Given(scales));
}

/// Picks the loads of a dtype.
#[target_feature(enable = "neon")]
fn dispatch(
    values: Values<'_>,
    code: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    scales: Scales<'_>,
) -> bool {
    let tree = Tree::new(code);
    match values {
        Values::F32(values) => blocks(
            Task { values, blocksize, packed, scales },
            &tree,
            |block| absmax_f32(block),
            |strip| strip_f32(strip),
        ),
        Values::F16(values) => blocks(
            Task { values, blocksize, packed, scales },
            &tree,
            |block| absmax_f16(block),
            |strip| strip_f16(strip),
        ),
        Values::Bf16(values) => blocks(
            Task { values, blocksize, packed, scales },
            &tree,
            |block| absmax_bf16(block),
            |strip| strip_bf16(strip),
        ),
    }
}

/// Quantizes groups of blocks. What depends on the dtype: the `absmax` of a block, `load` of a
/// strip.
#[inline]
#[target_feature(enable = "neon")]
fn blocks<T: Plain>(
    task: Task<'_, T>,
    tree: &Tree,
    absmax: impl Fn(&[T]) -> f32,
    load: impl Fn(&[T; STRIP]) -> [float32x4_t; 8],
) -> bool {
    let Task { values, blocksize, packed, mut scales } = task;
    let mut finite = true;
    let groups = values.chunks(GROUP * blocksize).zip(packed.chunks_mut(GROUP * blocksize / 2));
    for (group, (values, packed)) in groups.enumerate() {
        let mut found = [1.0; GROUP];
        let blocks = values.chunks_exact(blocksize);
        match &mut scales {
            Scales::Absmax(scales) => {
                let scales = scales[group * GROUP..].iter_mut();
                for ((found, scale), block) in found.iter_mut().zip(scales).zip(blocks) {
                    *found = absmax(block);
                    *scale = *found;
                    finite &= found.is_finite();
                }
            }
            Scales::Given(scales) => {
                let scales = scales[group * GROUP..].iter();
                found.iter_mut().zip(scales).for_each(|(found, scale)| *found = *scale);
            }
        }
        let inverse = found.map(|scale| 1.0 / at_least_smallest(scale));

        let strips = values.as_chunks::<STRIP>().0.chunks_exact(blocksize / STRIP);
        let bytes = packed.as_chunks_mut::<{ STRIP / 2 }>().0.chunks_exact_mut(blocksize / STRIP);
        for ((strips, bytes), inverse) in strips.zip(bytes).zip(inverse) {
            for (strip, bytes) in strips.iter().zip(bytes) {
                for line in 0..size_of_val(strip) / 64 {
                    prefetch(strip, AHEAD + 64 * line);
                }
                let places = load(strip).map(|x| tree.place(vmulq_n_f32(x, inverse)));
                store(bytes, tree.codes(places));
            }
        }
    }
    finite
}

/// Codes by a binary search over any 15 ascending bounds.
///
/// A place has bit `2 + k` set where the value is not above the bound of step `k`.
pub(crate) struct Tree {
    first: float32x4_t,
    /// The bounds that the other steps look at, by place.
    second: uint8x16_t,
    third: uint8x16_t,
    fourth: uint8x16x2_t,
    /// The code of each place, in the high nibble and in the low one.
    codes: [uint8x16_t; 2],
}

impl Tree {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn new(code: &Codebook) -> Self {
        // Of a value that overflowed to minus infinity a comparison with that says "not above";
        // one with NaN never does.
        let bound = |i: usize| match code.bounds()[i] {
            f32::NEG_INFINITY => f32::NAN,
            bound => bound,
        };
        // The bounds of a level lie `distance` apart, the first in the middle of that.
        let bounds = |first: u8, steps: u32| {
            let distance = 16 >> steps;
            load(&core::array::from_fn::<f32, 4, _>(|i| {
                bound(distance * Self::index(first + i as u8, steps) + distance / 2 - 1)
            }))
        };
        let codes = |shift: u32| {
            load(&core::array::from_fn::<u8, 16, _>(|i| {
                code.order()[Self::index(i as u8, 4)] << shift
            }))
        };
        Self {
            first: vdupq_n_f32(bound(7)),
            second: bounds(0, 1),
            third: bounds(0, 2),
            fourth: uint8x16x2_t(bounds(0, 3), bounds(4, 3)),
            codes: [codes(4), codes(0)],
        }
    }

    /// The index that the first `steps` bits of a place mean.
    pub(crate) fn index(place: u8, steps: u32) -> usize {
        usize::from((!place).reverse_bits() >> (8 - steps))
    }

    /// The place of each value, in all four bytes of its lane; plus the number of the byte.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(crate) fn place(&self, s: float32x4_t) -> uint8x16_t {
        let not_above = |bound| vreinterpretq_u8_u32(vcleq_f32(s, bound));
        let float = |bytes| vreinterpretq_f32_u8(bytes);
        let set = |place, bit, condition| vbslq_u8(vdupq_n_u8(bit), condition, place);

        let place = vreinterpretq_u8_u32(vdupq_n_u32(0x03_02_01_00));
        let place = set(place, 4, not_above(self.first));
        let place = set(place, 8, not_above(float(vqtbl1q_u8(self.second, place))));
        let place = set(place, 16, not_above(float(vqtbl1q_u8(self.third, place))));
        set(place, 32, not_above(float(vqtbl2q_u8(self.fourth, place))))
    }

    /// The codes of 32 places, two a byte.
    #[inline]
    #[target_feature(enable = "neon")]
    fn codes(&self, places: [uint8x16_t; 8]) -> uint8x16_t {
        let [a, b, c, d, e, f, g, h] = places;
        // The lowest byte of each lane: every second half, and every second byte of those.
        let halves = |a, b| {
            let [a, b] = [vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)];
            vreinterpretq_u8_u16(vuzp1q_u16(a, b))
        };
        let front = vuzp1q_u8(halves(a, b), halves(c, d));
        let back = vuzp1q_u8(halves(e, f), halves(g, h));
        let [even, odd] = [vuzp1q_u8(front, back), vuzp2q_u8(front, back)];
        let [high, low] = self.codes;
        let code = |codes, places| vqtbl1q_u8(codes, vshrq_n_u8::<2>(places));
        vorrq_u8(code(high, even), code(low, odd))
    }
}
