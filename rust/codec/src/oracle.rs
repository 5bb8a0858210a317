//! What the bytes must be, written for reading: one value at a time, no shortcuts.

use half::{bf16, f16};

/// The largest magnitude, or NaN if there is one.
fn absmax(block: &[f32]) -> f32 {
    block
        .iter()
        .fold(0.0, |a: f32, x| if a.is_nan() || x.is_nan() { f32::NAN } else { a.max(x.abs()) })
}

/// Packed codes and scales.
pub(crate) fn quantize_4bit(
    values: &[f32],
    table: &[f32; 16],
    blocksize: usize,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for block in values.chunks(blocksize) {
        let absmax = absmax(block);
        let divisor = if absmax < 1e-38 { 1e-38 } else { absmax };
        let ragged = block.len() < blocksize;
        scales.push(if ragged { divisor } else { absmax });
        codes.extend(block.iter().map(|x| {
            let scaled = if ragged { x / divisor } else { x * (1.0 / divisor) };
            nearest(scaled.clamp(-1.0, 1.0), table)
        }));
    }
    if codes.len() % 2 == 1 {
        codes.push(nearest(0.0, table));
    }
    (codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(), scales)
}

/// Packed codes against given scales.
pub(crate) fn encode_4bit(
    values: &[f32],
    scales: &[f32],
    table: &[f32; 16],
    blocksize: usize,
) -> Vec<u8> {
    let mut codes = Vec::new();
    for (block, &scale) in values.chunks(blocksize).zip(scales) {
        let divisor = if scale.abs() < 1e-38 { 1e-38_f32.copysign(scale) } else { scale };
        let ragged = block.len() < blocksize;
        codes.extend(block.iter().map(|x| {
            let scaled = if ragged { x / divisor } else { x * (1.0 / divisor) };
            nearest(scaled.clamp(-1.0, 1.0), table)
        }));
    }
    if codes.len() % 2 == 1 {
        codes.push(nearest(0.0, table));
    }
    codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The code of a scaled value.
fn nearest(scaled: f32, table: &[f32; 16]) -> u8 {
    let mut sorted: Vec<(f32, u8)> = table.iter().copied().zip(0..).collect();
    sorted.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap()); // stable
    for pair in sorted.windows(2) {
        let midpoint = (pair[0].0 + pair[1].0) / 2.0;
        if scaled <= midpoint {
            return pair[0].1;
        }
    }
    sorted[15].1
}

/// Values in fp32, not yet rounded to the output dtype.
pub(crate) fn dequantize_4bit(
    packed: &[u8],
    absmax: &[f32],
    table: &[f32; 16],
    blocksize: usize,
    len: usize,
) -> Vec<f32> {
    let code = |i: usize| if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
    (0..len).map(|i| table[usize::from(code(i))] * absmax[i / blocksize]).collect()
}

/// Codes and scales.
pub(crate) fn quantize_int8(values: &[f32], blocksize: usize) -> (Vec<i8>, Vec<f32>) {
    quantize_int8_by(values, blocksize, |absmax| 127.0 / absmax)
}

/// Codes and scales, by bitsandbytes' factor.
pub(crate) fn quantize_int8_rows(values: &[f32], row: usize) -> (Vec<i8>, Vec<f32>) {
    quantize_int8_by(values, row, |absmax| 127.0 * (1.0 / absmax))
}

fn quantize_int8_by(
    values: &[f32],
    blocksize: usize,
    factor: impl Fn(f32) -> f32,
) -> (Vec<i8>, Vec<f32>) {
    let mut codes = Vec::new();
    let mut scales = Vec::new();
    for block in values.chunks(blocksize) {
        let absmax = absmax(block);
        scales.push(absmax);
        let factor = if absmax < 1e-36 { 0.0 } else { factor(absmax) };
        codes.extend(block.iter().map(|x| {
            let rounded = (x * factor).round_ties_even();
            if absmax.is_finite() {
                rounded.clamp(-127.0, 127.0) as i8
            } else {
                0
            }
        }));
    }
    (codes, scales)
}

/// Values in fp32, not yet rounded to the output dtype.
pub(crate) fn dequantize_int8(codes: &[i8], absmax: &[f32], blocksize: usize) -> Vec<f32> {
    let step = |i: usize| absmax[i / blocksize] * (1.0 / 127.0_f64) as f32;
    codes.iter().enumerate().map(|(i, &code)| f32::from(code) * step(i)).collect()
}

/// Rounded by integer arithmetic, which no instruction set changes.
pub(crate) fn to_f16(value: f32) -> f16 {
    f16::from_f32_const(value)
}

/// Rounded by integer arithmetic, which no instruction set changes.
pub(crate) fn to_bf16(value: f32) -> bf16 {
    bf16::from_f32_const(value)
}
