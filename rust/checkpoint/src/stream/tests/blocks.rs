//! Codes of other programs, transposed matrices, bytes that are changed one by one.

use half::f16;

use super::*;
use crate::stream::blocks::{e8m0, E2M1};

/// `(experts, rows, columns)`: more than a chunk, rows that fill no cache line.
const SHAPE: [usize; 3] = [2, 333, 448];

fn numel() -> usize {
    SHAPE.iter().product()
}

/// Codes, then their scales; each byte is any.
fn stored(blocksize: usize, scales: std::ops::Range<u8>) -> Vec<u8> {
    let count = u32::from(scales.end - scales.start);
    let codes = (0..numel() as u32 / 2).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
    let scale = |i: u32| scales.start + (i.wrapping_mul(40_503) % count) as u8;
    codes.chain((0..(numel() / blocksize) as u32).map(scale)).collect()
}

fn blocks(blocksize: usize, scale: Scale) -> Source {
    Source::Blocks(Blocks { codes: at(0), scales: at(numel() / 2), blocksize, scale })
}

/// The value at `place`, by another way than the engine's.
fn value(bytes: &[u8], blocksize: usize, place: usize, scale: impl Fn(u8) -> f32) -> f32 {
    let code = bytes[place / 2] >> (4 * (place % 2)) & 15;
    E2M1[usize::from(code)] * scale(bytes[numel() / 2 + place / blocksize])
}

fn bf16s(bytes: &[u8]) -> Vec<bf16> {
    bytes.chunks(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]])).collect()
}

#[test]
fn powers_of_two_give_exact_values() {
    let bytes = stored(32, 1..250);
    let target = Target::Dense { dtype: Dtype::Bf16, at: at(0) };
    let job = weight(numel(), SHAPE[2], blocks(32, Scale::E8m0), target);
    let output = Memory::room(2 * numel());
    let (result, _, read) = stream(&[job], &Memory::new(bytes.clone()), &output, 3);
    result.unwrap();
    assert_eq!(read, numel() as u64 / 2);
    for (place, found) in bf16s(&output.take()).iter().enumerate() {
        let expected = value(&bytes, 32, place, e8m0);
        assert_eq!(found.to_f32().to_bits(), expected.to_bits(), "{place}");
    }
}

#[test]
fn small_floats_are_scaled_in_fp32_and_rounded_once() {
    let bytes = stored(16, 8..120);
    let scale = Scale::E4m3 { factor: 0.1, divisor: 3.0 };
    let target = Target::Dense { dtype: Dtype::F32, at: at(0) };
    let job = weight(numel(), SHAPE[2], blocks(16, scale), target);
    let output = Memory::room(4 * numel());
    stream(&[job], &Memory::new(bytes.clone()), &output, 2).0.unwrap();
    let small = |byte: u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3), f32::from(byte & 7));
        (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) * 0.1 / 3.0
    };
    for (place, found) in output.take().chunks(4).enumerate() {
        let found = f32::from_le_bytes([found[0], found[1], found[2], found[3]]);
        assert_eq!(found, value(&bytes, 16, place, small), "{place}");
    }
}

#[test]
fn matrices_are_transposed() {
    let [experts, rows, columns] = SHAPE;
    let bytes = stored(32, 120..130);
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let target = Target::Dense { dtype, at: at(0) };
        let Job::Weight(mut job) = weight(numel(), columns, blocks(32, Scale::E8m0), target) else {
            unreachable!()
        };
        job.transposed = Some(rows);
        let output = Memory::room(dtype.size() * numel());
        let job = [Job::Weight(job)];
        let (result, done, _) = stream(&job, &Memory::new(bytes.clone()), &output, 2);
        result.unwrap();
        let found = output.take();
        assert_eq!(done[0].crc, crc32fast::hash(&found));
        let found: Vec<f32> = match dtype {
            Dtype::F32 => {
                found.chunks(4).map(|v| f32::from_le_bytes([v[0], v[1], v[2], v[3]])).collect()
            }
            _ => bf16s(&found).iter().map(|v| v.to_f32()).collect(),
        };
        for (place, found) in found.iter().enumerate() {
            let (expert, rest) = (place / (rows * columns), place % (rows * columns));
            let (column, row) = (rest / rows, rest % rows);
            let from = (expert * rows + row) * columns + column;
            assert_eq!(*found, value(&bytes, 32, from, e8m0), "{dtype:?} {place}");
        }
        assert!(experts * rows * columns == found.len());
    }
}

#[test]
fn what_is_no_matrix_is_not_transposed() {
    let target = || Target::Dense { dtype: Dtype::F32, at: at(0) };
    for rows in [0, 5, usize::MAX] {
        let Job::Weight(mut job) = weight(numel(), SHAPE[2], dense(Dtype::F32), target()) else {
            unreachable!()
        };
        job.transposed = Some(rows);
        let files = (Memory::new(Vec::new()), Memory::room(0));
        let error = stream(&[Job::Weight(job)], &files.0, &files.1, 1).0.unwrap_err();
        assert!(error.to_string().contains("no matrices of"), "{error}");
    }
}

#[test]
fn bytes_change_one_by_one() {
    let bytes: Vec<u8> = (0..(3 << 20) + 5u32).map(|i| (i * 7 + (i >> 8)) as u8).collect();
    for (change, growth) in [(Change::SwappedNibbles, 1), (Change::E8m0ToF32, 4)] {
        let job = Job::Copy {
            name: "bytes".into(),
            nbytes: bytes.len() as u64,
            change,
            source: at(0),
            target: at(2),
        };
        let output = Memory::room(2 + growth * bytes.len());
        let (result, done, _) = stream(&[job], &Memory::new(bytes.clone()), &output, 3);
        result.unwrap();
        let expected: Vec<u8> = match change {
            Change::E8m0ToF32 => bytes.iter().flat_map(|b| e8m0(*b).to_le_bytes()).collect(),
            _ => bytes.iter().map(|b| b.rotate_left(4)).collect(),
        };
        assert!(output.take()[2..] == expected);
        assert_eq!(done[0].crc, crc32fast::hash(&expected));
    }
}

/// Codes are decoded to the dtype that is written: where it is too small must be noticed all the
/// same.
#[test]
fn codes_whose_values_a_dtype_cannot_hold_are_refused() {
    let mut values = weights(300_000);
    let (format, target) = (format(4, 64, false), Target::Dense { dtype: Dtype::F16, at: at(0) });
    for (large, infinite) in [(60_000.0, false), (70_000.0, false), (f32::INFINITY, true)] {
        values[280_001] = if infinite { 1.0 } else { large };
        let (codes, mut scales, ..) = whole(Values::F32(&values), &format, false);
        if infinite {
            scales[..4].copy_from_slice(&large.to_le_bytes());
        }
        let len = codes.len();
        let source = Source::Quantized(Stored {
            format: format.clone(),
            codes: at(0),
            scales: at(len),
            nested: at(0),
            offset: 0.0,
        });
        let job = weight(values.len(), values.len(), source, target.clone());
        let output = Memory::room(2 * values.len());
        let input = Memory::new([codes, scales].concat());
        let result = stream(&[job], &input, &output, 2).0;
        if large == 70_000.0 {
            let error = result.unwrap_err();
            assert!(matches!(error, CheckpointError::Overflow { index: 280_001, .. }), "{error:?}");
        } else {
            result.unwrap();
            let bytes = output.take();
            let found = f16::from_le_bytes([bytes[0], bytes[1]]);
            assert_eq!(found.is_infinite() || found.is_nan(), infinite);
        }
    }
}
