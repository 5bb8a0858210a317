//! The reference body: plain Rust, any machine.

use crate::values::{plain_nan, with_slice, Element, Stores, ValuesMut};

/// Dequantizes whole blocks.
pub(crate) fn dequantize(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    _stores: Stores,
    values: ValuesMut<'_>,
) {
    with_slice!(values, ValuesMut, v => {
        let inputs = packed.chunks_exact(blocksize / 2).zip(absmax);
        for (block, (packed, &absmax)) in v.chunks_exact_mut(blocksize).zip(inputs) {
            dequantize_block(packed, absmax, table, block);
        }
    });
}

/// Dequantizes one block of any length.
pub(crate) fn dequantize_block<T: Element>(
    packed: &[u8],
    absmax: f32,
    table: &[f32; 16],
    block: &mut [T],
) {
    let absmax = plain_nan(absmax);
    let mut scaled = [T::ZERO; 16];
    T::narrow(&table.map(|value| value * absmax), &mut scaled);
    let high = |byte: u8| scaled[usize::from(byte >> 4)];
    let low = |byte: u8| scaled[usize::from(byte & 15)];

    let (pairs, odd) = block.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(packed) {
        *pair = [high(byte), low(byte)];
    }
    if let ([last], Some(&byte)) = (odd, packed.last()) {
        *last = high(byte);
    }
}
