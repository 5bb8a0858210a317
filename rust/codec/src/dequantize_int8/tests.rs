//! Every body against the oracle, bit for bit.

use proptest::prelude::*;

use super::*;
use crate::float_env::flushing_subnormals;
use crate::layout::num_blocks;
use crate::oracle;
use crate::simd::available;
use crate::testing::{
    hard_values, lengths, row_shapes, shapes, Random, Weights, BLOCKSIZES, LINE, PLACES, ROWS,
};

fn codes(seed: u64, len: usize) -> Vec<i8> {
    Random(seed).bytes(len).into_iter().map(|byte| byte as i8).collect() // -128 too
}

fn check(codes: &[i8], scales: &[f32], blocksize: usize) {
    let exact = oracle::dequantize_int8(codes, scales, blocksize);
    let expected = [
        Weights::F32(exact.clone()),
        Weights::F16(exact.iter().map(|&x| oracle::to_f16(x)).collect()),
        Weights::Bf16(exact.iter().map(|&x| oracle::to_bf16(x)).collect()),
    ];
    let len = codes.len();
    let places = PLACES.map(|place| (Stores::Streaming, place));
    for &bodies in available() {
        let engine = Engine::new(bodies, 1);
        for (stores, place) in places.into_iter().chain([(Stores::Cached, 0)]) {
            for (mut room, expected) in Weights::room(len + LINE).into_iter().zip(&expected) {
                let untouched = room.bits();
                let (before, values) = room.place(place, len);
                dequantize_int8(engine, codes, scales, blocksize, values, stores).unwrap();
                let (found, expected) = (room.bits(), expected.bits());
                let (front, rest) = found.split_at(before);
                let (found, behind) = rest.split_at(len);
                let wrong = found.iter().zip(&expected).position(|(f, e)| f != e);
                let name = bodies.name();
                assert_eq!(wrong, None, "{name} value, {len} by {blocksize}, {stores:?} {place}");
                assert_eq!([front, behind].concat(), untouched[len..], "written outside");
            }
        }
    }
}

proptest! {
    #[test]
    fn any_codes((seed, blocksize, len) in shapes()) {
        let scales = hard_values(seed, num_blocks(len, blocksize), 4);
        check(&codes(seed, len), &scales, blocksize);
    }

    #[test]
    fn rows_of_any_length((seed, row, len) in row_shapes()) {
        check(&codes(seed, len), &hard_values(seed, num_blocks(len, row), 4), row);
    }

    #[test]
    fn any_scale(bits in any::<u32>()) {
        check(&codes(0, 300), &[f32::from_bits(bits); 5], 64);
    }
}

#[test]
fn every_block_size_and_length() {
    for blocksize in BLOCKSIZES {
        for len in lengths(blocksize) {
            let scales = hard_values(len as u64, num_blocks(len, blocksize), 4);
            check(&codes(len as u64, len), &scales, blocksize);
        }
    }
}

#[test]
fn rows_of_every_kind_of_length() {
    for row in ROWS {
        for len in [0, 1, row - 1, row, row + 1, 33 * row + row / 2] {
            let scales = hard_values(len as u64, num_blocks(len, row), 4);
            check(&codes(len as u64, len), &scales, row);
        }
    }
}

#[test]
fn bodies_agree_on_the_bits_of_nan() {
    let codes = codes(4, 64);
    let absmax = [f32::from_bits(0xffbf_ffff), f32::from_bits(0x7f80_0001)];
    for &bodies in available() {
        let (mut found, engine) = ([0.0_f32; 64], Engine::new(bodies, 1));
        dequantize_int8(engine, &codes, &absmax, 32, ValuesMut::F32(&mut found), Stores::Cached)
            .unwrap();
        assert_eq!(found.map(f32::to_bits)[0], 0xffff_0000, "{}", bodies.name());
        assert_eq!(found.map(f32::to_bits)[63], 0x7fc0_0000, "{}", bodies.name());
    }
}

#[test]
fn the_callers_float_environment_does_not_matter() {
    let codes = codes(2, 250);
    let absmax = [1e-38, -1e-39, 5e-41, 1e-45, -1e-6, 3e-8, f32::MIN_POSITIVE, 1.0];
    for &bodies in available() {
        let engine = Engine { bodies, ..Engine::detect().unwrap() };
        for room in Weights::room(250) {
            let run = || {
                let mut found = room.clone();
                dequantize_int8(engine, &codes, &absmax, 32, found.values_mut(), Stores::Cached)
                    .unwrap();
                found.bits()
            };
            assert!(run() == flushing_subnormals(run), "{}", bodies.name());
        }
    }
}

#[test]
fn any_number_of_threads() {
    let len = 3 * (1 << 20) + 12_345;
    let codes = codes(1, len);
    for (blocksize, room) in [64, 172, JOB + 33].into_iter().zip(Weights::room(len)) {
        let absmax = hard_values(1, num_blocks(len, blocksize), 4);
        for &bodies in available() {
            let run = |threads| {
                let (mut found, engine) = (room.clone(), Engine::new(bodies, threads));
                dequantize_int8(
                    engine,
                    &codes,
                    &absmax,
                    blocksize,
                    found.values_mut(),
                    Stores::Cached,
                )
                .unwrap();
                found.bits()
            };
            let alone = run(1);
            for threads in [0, 2, 7] {
                assert!(run(threads) == alone, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let engine = Engine::detect().unwrap();
    let run = |codes: usize, absmax: usize| {
        let (codes, absmax) = (vec![0; codes], vec![0.0; absmax]);
        dequantize_int8(engine, &codes, &absmax, 64, ValuesMut::F32(&mut [0.0; 65]), Stores::Cached)
    };
    assert_eq!(run(65, 2), Ok(()));
    assert_eq!(
        dequantize_int8(engine, &[], &[], 0, ValuesMut::F32(&mut []), Stores::Cached),
        Err(CodecError::Row)
    );
    assert!(matches!(run(64, 2), Err(CodecError::Length { what: "packed", .. })));
    assert!(matches!(run(65, 1), Err(CodecError::Length { what: "absmax", .. })));
}
