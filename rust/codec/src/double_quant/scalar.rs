//! The reference body: plain Rust, any machine, groups of any length.

use crate::double_quant::search::Search;
use crate::double_quant::{decode, NESTED_BLOCKSIZE};

/// Codes groups of scales, the last of which may be shorter; tells whether all scales survive.
pub(crate) fn quantize(
    absmax: &[f32],
    offset: f32,
    search: &Search,
    codes: &mut [u8],
    nested: &mut [f32],
) -> bool {
    let groups = absmax.chunks(NESTED_BLOCKSIZE).zip(codes.chunks_mut(NESTED_BLOCKSIZE));
    groups.zip(nested).fold(true, |all, ((group, codes), nested)| {
        all & quantize_group(group, offset, search, codes, nested)
    })
}

/// Codes one group; tells whether its scales survive.
fn quantize_group(
    group: &[f32],
    offset: f32,
    search: &Search,
    codes: &mut [u8],
    nested: &mut f32,
) -> bool {
    // Magnitudes as integers, where NaN is the largest and cannot hide.
    let magnitude = |a: &f32| (a - offset).abs().to_bits() as i32;
    *nested = f32::from_bits(group.iter().map(magnitude).fold(0, i32::max) as u32);

    let mut normalised = [0.0; NESTED_BLOCKSIZE];
    let normalised = &mut normalised[..group.len()];
    for (normalised, a) in normalised.iter_mut().zip(group) {
        let quotient = (a - offset) / *nested;
        // NaN: zero by zero, or a scale that is not finite.
        *normalised = if quotient.is_nan() { 0.0 } else { quotient };
    }
    search.count_below(normalised, codes);
    group.iter().zip(codes).fold(true, |all, (&a, &mut code)| {
        let decoded = decode(search.table(), code, *nested, offset);
        // Within 1/8 of a scale that is not zero lie only values of its sign.
        all & (a == 0.0 || (decoded - a).abs() <= a.abs() / 8.0)
    })
}
