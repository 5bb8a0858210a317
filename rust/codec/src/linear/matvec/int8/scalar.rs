//! The reference body: plain Rust, any machine.

use std::ops::Range;

use crate::dequantize_int8::step;
use crate::linear::matvec::int8::{Chunk, Piece, Rounded, BLOCK, CHUNK};
use crate::linear::weight::{Codes, Weight};

/// Writes the sums of some rows.
pub(crate) fn multiply(weight: &Weight<'_>, rows: Range<usize>, x: &Rounded, sums: &mut [f32]) {
    let count = rows.len();
    let cols = weight.cols;
    let mut scales = vec![0.0; cols / weight.blocksize];
    for (i, row) in rows.enumerate() {
        weight.scales.write(row * scales.len(), &mut scales);
        let scale = |k: usize| scales[k / weight.blocksize];
        match (weight.codes, x) {
            (Codes::FourBit { packed, .. }, Rounded::FourBit { chunks, table }) => {
                let packed = &packed[row * cols / 2..(row + 1) * cols / 2];
                for (token, chunks) in chunks.chunks_exact(cols.div_ceil(CHUNK)).enumerate() {
                    sums[token * count + i] = four_bit(packed, chunks, table, scale);
                }
            }
            (Codes::Int8(codes), Rounded::Int8(pieces)) => {
                let codes = &codes[row * cols..(row + 1) * cols];
                let a_token = cols.next_multiple_of(CHUNK) / BLOCK;
                for (token, pieces) in pieces.chunks_exact(a_token).enumerate() {
                    sums[token * count + i] = int8(codes, pieces, |k| step(scale(k)));
                }
            }
            _ => unreachable!("x was rounded for this weight"),
        }
    }
}

/// The sum of a row of 4-bit codes; `scale` is that of the block of value `k`.
fn four_bit(
    packed: &[u8],
    chunks: &[Chunk],
    table: &[[u8; 16]; 2],
    scale: impl Fn(usize) -> f32,
) -> f32 {
    let mut sum = 0.0;
    for (i, (packed, chunk)) in packed.chunks(CHUNK / 2).zip(chunks).enumerate() {
        for (lane, packed) in packed.chunks_exact(4).enumerate() {
            let mut halves = [chunk.start[lane], 0];
            for (j, byte) in packed.iter().enumerate() {
                let x = [chunk.even[4 * lane + j], chunk.odd[4 * lane + j]].map(i32::from);
                for (half, table) in halves.iter_mut().zip(table) {
                    let codes = [byte >> 4, byte & 15].map(|code| table[usize::from(code)]);
                    *half += i32::from(codes[0]) * x[0] + i32::from(codes[1]) * x[1];
                }
            }
            let integer = 128 * halves[0] + halves[1];
            sum += integer as f32 * chunk.step[lane] * scale(i * CHUNK + 8 * lane);
        }
    }
    sum
}

/// The sum of a row of 8-bit codes; `step` is that of the block of value `k`.
fn int8(codes: &[i8], pieces: &[Piece], step: impl Fn(usize) -> f32) -> f32 {
    let products = codes.chunks(BLOCK).zip(pieces).enumerate().map(|(i, (codes, piece))| {
        let pairs = codes.iter().zip(&piece.values);
        let integer: i32 = pairs.map(|(&code, &x)| i32::from(code) * i32::from(x)).sum();
        integer as f32 * piece.step * step(i * BLOCK)
    });
    products.sum()
}
