//! AVX2: values widened.

use std::arch::x86_64::*;

use crate::values::{Element, Values};
use crate::x86::avx2::{load_f16, load_half, store};

/// Floats in a vector.
const LANES: usize = 8;

/// Writes the values as floats.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn widen(values: Values<'_>, floats: &mut [f32]) {
    assert_eq!(values.len(), floats.len());
    let (vectors, rest) = floats.as_chunks_mut::<LANES>();
    match values {
        Values::F32(values) => floats.copy_from_slice(values),
        Values::F16(values) => {
            let (values, tail) = values.as_chunks();
            for (to, from) in vectors.iter_mut().zip(values) {
                store(to, _mm256_castps_si256(load_f16(from)));
            }
            Element::widen(tail, rest);
        }
        Values::Bf16(values) => {
            let (values, tail) = values.as_chunks::<LANES>();
            for (to, from) in vectors.iter_mut().zip(values) {
                let bits = _mm256_cvtepu16_epi32(load_half(from));
                store(to, _mm256_slli_epi32::<16>(bits));
            }
            Element::widen(tail, rest);
        }
    }
}
