//! Against the codec on whole tensors.

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use proptest::prelude::*;
use qkern_codec::{
    dequantize_4bit, dequantize_absmax, encode_4bit, quantize_4bit, quantize_absmax, quantize_int8,
    quantize_int8_rows, search_scales, Codebook, Engine, NonFinite, Stores, Values, ValuesMut,
};

use super::*;
use memory::{stream, stream_until, Keeper, Memory};

mod blocks;
mod delta;
mod faults;
mod memory;
mod transposed;

fn at(offset: usize) -> Span {
    Span { file: 0, offset: offset as u64 }
}

fn table() -> [f32; 16] {
    std::array::from_fn(|i| if i == 15 { 1.0 } else { (i as f32 - 7.0) / 7.5 })
}

fn nested_table() -> [f32; 256] {
    std::array::from_fn(|i| (i as f32 - 127.0) / 128.0)
}

fn format(bits: usize, blocksize: usize, nested: bool) -> Format {
    let nested_code = nested.then(|| Box::new(nested_table()));
    Format { code: (bits == 4).then(table), blocksize, per_row: false, nested_code }
}

fn rows(row: usize) -> Format {
    Format { code: None, blocksize: row, per_row: true, nested_code: None }
}

/// Values of a normal kind, the same for a seed.
fn weights(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut unit = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| unit() + unit() + unit()).collect()
}

fn dense(dtype: Dtype) -> Source {
    Source::Dense { dtype, at: at(8) }
}

/// Bytes with the values from byte 8 on.
fn input(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    match dtype {
        Dtype::F32 => bytes.extend_from_slice(cast_slice(values)),
        _ => values.iter().for_each(|v| bytes.extend(bf16::from_f32(*v).to_le_bytes())),
    }
    bytes
}

fn weight(numel: usize, row: usize, source: Source, target: Target) -> Job {
    Job::Weight(Box::new(Weight {
        name: "w".into(),
        numel,
        row,
        source,
        delta: None,
        transposed: None,
        target,
    }))
}

fn coded(format: &Format, numel: usize, search: bool) -> (Target, usize) {
    let packed = format.packed_size(numel);
    let codes = 3; // an odd place
    let target = Target::Quantized(Coded {
        format: format.clone(),
        codes: at(codes),
        scales: at(codes + packed),
        search,
        measure: true,
    });
    (target, codes + packed + 4 * format.num_blocks(numel))
}

/// Codes and scales of a whole tensor, by the codec alone; whether in 8 bits, and their offset.
fn whole(values: Values<'_>, format: &Format, search: bool) -> (Vec<u8>, Vec<u8>, bool, f32) {
    let (engine, numel) = (Engine { threads: 1, ..Engine::detect().unwrap() }, values.len());
    let mut codes = vec![0; format.packed_size(numel)];
    let mut scales = vec![0.0; format.num_blocks(numel)];
    let (blocksize, refuse) = (format.blocksize, NonFinite::Error);
    let code = format.code.map(|table| Codebook::new(&table).unwrap());
    let signed = cast_slice_mut(&mut codes);
    match &code {
        Some(code) if search => {
            search_scales(engine, values, code, blocksize, None, refuse, &mut scales)
        }
        Some(code) => {
            quantize_4bit(engine, values, code, blocksize, refuse, &mut codes, &mut scales)
        }
        None if format.per_row => {
            quantize_int8_rows(engine, values, blocksize, refuse, signed, &mut scales)
        }
        None => quantize_int8(engine, values, blocksize, refuse, signed, &mut scales),
    }
    .unwrap();
    let mut bytes = cast_slice(&scales).to_vec();
    let (mut safe, mut offset) = (false, 0.0);
    if let Some(table) = &format.nested_code {
        let (mut coded, mut nested) =
            (vec![0; scales.len()], vec![0.0; scales.len().div_ceil(256)]);
        let found = quantize_absmax(engine, &scales, table, &mut coded, &mut nested).unwrap();
        if found.safe {
            (safe, offset) = (true, found.offset);
            dequantize_absmax(engine, &coded, table, &nested, offset, &mut scales).unwrap();
            coded.extend_from_slice(cast_slice(&nested));
            bytes = coded;
        }
    }
    if let (Some(code), true) = (&code, search) {
        encode_4bit(engine, values, code, blocksize, &scales, &mut codes).unwrap();
    }
    (codes, bytes, safe, offset)
}

const LENGTHS: [usize; 4] = [0, 100, 1 << 18, (1 << 19) + 4 * 577 + 1];

#[test]
fn codes_and_scales_are_those_of_the_whole_tensor() {
    let kinds = [
        (format(4, 64, true), false),
        (format(4, 64, true), true),
        (format(4, 4096, false), false),
        (format(8, 32, true), false),
    ];
    for numel in LENGTHS {
        let values = weights(numel);
        for (dtype, threads) in [(Dtype::F32, 1), (Dtype::Bf16, 3)] {
            let source = Memory::new(input(&values, dtype));
            let rounded: Vec<_> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            for (format, search) in &kinds {
                let (target, len) = coded(format, numel, *search);
                let (output, packed) = (Memory::room(len), format.packed_size(numel));
                let job = weight(numel, numel, dense(dtype), target);
                let (result, done, read) = stream(&[job], &source, &output, threads);
                result.unwrap();
                let values = match dtype {
                    Dtype::F32 => Values::F32(&values),
                    _ => Values::Bf16(&rounded),
                };
                let (codes, scales, safe, offset) = whole(values, format, *search);
                let bytes = output.take();
                assert!(bytes[3..3 + packed] == codes, "{numel} {format:?}");
                assert!(bytes[3 + packed..][..scales.len()] == scales, "{numel} {format:?}");
                assert_eq!((done[0].double_quant, done[0].offset), (safe, offset));
                assert_eq!(done[0].crc, crc32fast::hash(&codes));
                assert_eq!(done[0].crc_scales, crc32fast::hash(&scales));
                assert_eq!(read, (numel * dtype.size()) as u64);
                let errors = done[0].errors.unwrap();
                assert!(numel > 1 << 18 || errors.count == numel as u64);
                assert!(errors.squared_error <= 0.03 * errors.squared, "{errors:?}");
            }
        }
    }
}

#[test]
fn rows_keep_their_scales_whatever_their_length() {
    for (row, count) in [(1, 5), (577, 911), (300_000, 2)] {
        let (values, format) = (weights(row * count), rows(row));
        let source = Memory::new(input(&values, Dtype::F32));
        let (target, len) = coded(&format, values.len(), false);
        let output = Memory::room(len);
        let job = weight(values.len(), row, dense(Dtype::F32), target);
        stream(&[job], &source, &output, 2).0.unwrap();
        let (codes, scales, ..) = whole(Values::F32(&values), &format, false);
        assert!(output.take()[3..] == [codes, scales].concat(), "{row}");
    }
}

/// Scales of every second block are so small that 8 bits lose them.
#[test]
fn scales_that_8_bits_lose_are_stored_in_32() {
    let mut values = weights(64 * 600);
    values.chunks_mut(64).step_by(2).for_each(|block| block.iter_mut().for_each(|v| *v *= 1e-4));
    let format = format(4, 64, true);
    let (target, len) = coded(&format, values.len(), false);
    let (source, output) = (Memory::new(input(&values, Dtype::F32)), Memory::room(len));
    let job = weight(values.len(), 64, dense(Dtype::F32), target);
    let (result, done, _) = stream(&[job], &source, &output, 2);
    result.unwrap();
    assert!(!done[0].double_quant);
    let (codes, scales, safe, _) = whole(Values::F32(&values), &format, false);
    assert!(!safe);
    assert_eq!(scales.len(), 4 * 600);
    assert!(output.take()[3..] == [codes, scales].concat());
}

/// A quantized file of the values, and the source that reads it.
fn quantized(values: &[f32], format: Format) -> (Memory, Source) {
    let (codes, scales, safe, offset) = whole(Values::F32(values), &format, false);
    assert_eq!(safe, format.nested_code.is_some());
    let scales_at = at(codes.len());
    let nested = at(codes.len() + format.num_blocks(values.len()));
    let stored = Stored { format, codes: at(0), scales: scales_at, nested, offset };
    (Memory::new([codes, scales].concat()), Source::Quantized(stored))
}

fn decoded(values: &[f32], format: &Format) -> Vec<f32> {
    let engine = Engine::detect().unwrap();
    let (codes, bytes, safe, offset) = whole(Values::F32(values), format, false);
    let blocks = format.num_blocks(values.len());
    let (mut scales, mut result) = (vec![0.0; blocks], vec![0.0; values.len()]);
    if let (Some(table), true) = (&format.nested_code, safe) {
        let mut nested = vec![0.0f32; blocks.div_ceil(256)];
        cast_slice_mut(&mut nested).copy_from_slice(&bytes[blocks..]);
        dequantize_absmax(engine, &bytes[..blocks], table, &nested, offset, &mut scales).unwrap();
    } else {
        cast_slice_mut(&mut scales).copy_from_slice(&bytes);
    }
    let (table, to) = (format.code.unwrap(), ValuesMut::F32(&mut result));
    dequantize_4bit(engine, &codes, &scales, &table, format.blocksize, to, Stores::Cached).unwrap();
    result
}

#[test]
fn what_was_quantized_is_decoded_to_any_dtype() {
    for (blocksize, nested) in [(64, true), (4096, true), (128, false)] {
        let (values, format) = (weights(LENGTHS[3]), format(4, blocksize, nested));
        let expected = decoded(&values, &format);
        let (input, source) = quantized(&values, format);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let target = Target::Dense { dtype, at: at(1) };
            let job = weight(values.len(), values.len(), source.clone(), target);
            let output = Memory::room(1 + values.len() * dtype.size());
            let (result, done, _) = stream(&[job], &input, &output, 3);
            result.unwrap();
            let bytes = output.take();
            let rounded: Vec<_> = expected.iter().map(|v| bf16::from_f32(*v)).collect();
            let right = match dtype {
                Dtype::F32 => bytes[1..] == *cast_slice::<_, u8>(&expected),
                _ => bytes[1..] == *cast_slice::<_, u8>(&rounded),
            };
            assert!(right, "{blocksize} {dtype:?}");
            assert_eq!(done[0].crc, crc32fast::hash(&bytes[1..]));
        }
    }
}

/// Rows that begin inside blocks, and inside groups of scales.
#[test]
fn what_was_quantized_is_quantized_anew() {
    let (row, count) = (1001, 700);
    let (values, from) = (weights(row * count), format(4, 64, true));
    let expected = whole(Values::F32(&decoded(&values, &from)), &rows(row), false);
    let (input, source) = quantized(&values, from);
    let (target, len) = coded(&rows(row), values.len(), false);
    let output = Memory::room(len);
    let job = weight(values.len(), row, source, target);
    stream(&[job], &input, &output, 2).0.unwrap();
    assert!(output.take()[3..] == [expected.0, expected.1].concat());
}

#[test]
fn values_that_are_not_finite_are_counted_to_the_end() {
    let mut values = weights(LENGTHS[3]);
    for place in [70_000, 300_000, 300_001, values.len() - 1] {
        values[place] = f32::NAN;
    }
    let source = Memory::new(input(&values, Dtype::F32));
    for search in [false, true] {
        let (target, len) = coded(&format(4, 64, true), values.len(), search);
        let job = weight(values.len(), values.len(), dense(Dtype::F32), target);
        let (result, done, _) = stream(&[job], &source, &Memory::room(len), 2);
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("w: NaN or infinity in 4 "), "{text}");
        assert!(text.contains("first at index 70000"), "{text}");
        assert!(done.is_empty());
    }
}

#[test]
fn what_a_dtype_cannot_hold_is_refused_and_infinity_is_not() {
    let mut values = weights(LENGTHS[3]);
    values[5] = f32::INFINITY;
    let to_half = Target::Dense { dtype: Dtype::F16, at: at(0) };
    let job = weight(values.len(), values.len(), dense(Dtype::F32), to_half);
    let output = || Memory::room(2 * LENGTHS[3]);
    let job = [job];
    stream(&job, &Memory::new(input(&values, Dtype::F32)), &output(), 2).0.unwrap();
    values[400_000] = 65520.0;
    let result = stream(&job, &Memory::new(input(&values, Dtype::F32)), &output(), 2).0;
    let found = result.unwrap_err();
    assert!(
        matches!(found, CheckpointError::Overflow { index: 400_000, dtype: "float16", .. }),
        "{found:?}"
    );
}

proptest! {
    #[test]
    fn checksums_of_parts_are_those_of_the_whole(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        cut in 0usize..300,
    ) {
        let (head, tail) = bytes.split_at(cut.min(bytes.len()));
        let parts = [head, tail].map(|part| (crc32fast::hash(part), part.len() as u64));
        prop_assert_eq!(weight::combined(&parts), crc32fast::hash(&bytes));
    }

    #[test]
    fn rounding_is_that_of_the_codec(values in proptest::collection::vec(any::<f32>(), 0..200)) {
        let mut buffer = values::ValueBuffer::default();
        let (rounded, overflow) = values::round(&values, Dtype::Bf16, &mut buffer);
        let mut expected = vec![bf16::ZERO; values.len()];
        expected.convert_from_f32_slice(&values);
        let Values::Bf16(rounded) = rounded else { unreachable!() };
        let bits = |v: &[bf16]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(rounded), bits(&expected));
        let lost = |v: &f32| v.is_finite() && bf16::from_f32(*v).is_infinite();
        prop_assert_eq!(overflow, values.iter().position(lost));
    }
}
