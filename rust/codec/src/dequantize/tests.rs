//! Every body against the oracle, bit for bit.

use proptest::prelude::*;

use super::*;
use crate::codebook::tests::{fp4, NF4};
use crate::float_env::flushing_subnormals;
use crate::layout::num_blocks;
use crate::oracle;
use crate::simd::available;
use crate::testing::{
    hard_values, lengths, shapes, tables, Random, Weights, BLOCKSIZES, LINE, PLACES,
};

/// Scales of every kind: of both signs, tiny, huge, zero.
fn scales(seed: u64, count: usize) -> Vec<f32> {
    hard_values(seed, count, 4)
}

fn check(seed: u64, scales: &[f32], table: &[f32; 16], blocksize: usize, len: usize) {
    let packed = Random(seed).bytes(packed_len(len));
    let exact = oracle::dequantize_4bit(&packed, scales, table, blocksize, len);
    let expected = [
        Weights::F32(exact.clone()),
        Weights::F16(exact.iter().map(|&x| oracle::to_f16(x)).collect()),
        Weights::Bf16(exact.iter().map(|&x| oracle::to_bf16(x)).collect()),
    ];
    let places = PLACES.map(|place| (Stores::Streaming, place));
    for &bodies in available() {
        let engine = Engine::new(bodies, 1);
        for (stores, place) in places.into_iter().chain([(Stores::Cached, 0)]) {
            for (mut room, expected) in Weights::room(len + LINE).into_iter().zip(&expected) {
                let untouched = room.bits();
                let (before, values) = room.place(place, len);
                dequantize_4bit(engine, &packed, scales, table, blocksize, values, stores).unwrap();
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
    fn any_codes((seed, blocksize, len) in shapes(), table in 0..3_usize) {
        check(seed, &scales(seed, num_blocks(len, blocksize)), &tables()[table], blocksize, len);
    }

    #[test]
    fn any_scale(bits in any::<u32>(), table in 0..3_usize) {
        check(bits.into(), &[f32::from_bits(bits); 2], &tables()[table], 64, 100);
    }
}

#[test]
fn every_block_size_and_length() {
    for blocksize in BLOCKSIZES {
        for len in lengths(blocksize) {
            let scales = scales(len as u64, num_blocks(len, blocksize));
            check(len as u64, &scales, &NF4, blocksize, len);
        }
    }
}

#[test]
fn rounding_of_every_kind() {
    // Products that are ties, subnormal, just below and just above the largest of each dtype.
    let edges = [
        65504.0,
        65519.0,
        65520.0,
        65536.0,
        3.389e38,
        3.396e38,
        f32::MAX,
        5.96e-8,
        2.98e-8,
        2.99e-8,
        6.1e-5,
        1e-40,
        9.2e-41,
        f32::MIN_POSITIVE,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        1.000_488_3,
        f32::INFINITY,
        f32::NAN,
        f32::from_bits(0x7fff_ffff),
        f32::from_bits(0xff80_0001),
        0.0,
    ];
    for scale in edges.into_iter().flat_map(|e| [e, -e, e.next_up(), e.next_down()]) {
        for table in tables() {
            check(1, &[scale; 3], &table, 32, 90);
        }
    }
}

#[test]
fn bodies_agree_on_the_bits_of_nan() {
    let packed = Random(4).bytes(32);
    let absmax = [f32::from_bits(0xffbf_ffff), f32::from_bits(0x7f80_0001)];
    let run = |bodies, mut found: Weights| {
        let engine = Engine::new(bodies, 1);
        dequantize_4bit(engine, &packed, &absmax, &NF4, 32, found.values_mut(), Stores::Cached)
            .unwrap();
        match found {
            Weights::F32(v) => v.iter().map(|x| x.to_bits()).collect::<Vec<u32>>(),
            Weights::F16(v) => v.iter().map(|x| x.to_bits().into()).collect(),
            Weights::Bf16(v) => v.iter().map(|x| x.to_bits().into()).collect(),
        }
    };
    for room in Weights::room(64) {
        let scalar = run(available()[available().len() - 1], room.clone());
        for &bodies in available() {
            assert_eq!(run(bodies, room.clone()), scalar, "{}", bodies.name());
        }
    }
}

#[test]
fn the_callers_float_environment_does_not_matter() {
    let packed = Random(2).bytes(packed_len(250));
    let absmax = [1e-38, -1e-39, 5e-41, 1e-45, -1e-6, 3e-8, f32::MIN_POSITIVE, 1.0];
    for &bodies in available() {
        let engine = Engine { bodies, ..Engine::detect().unwrap() };
        for room in Weights::room(250) {
            let run = || {
                let mut found = room.clone();
                dequantize_4bit(
                    engine,
                    &packed,
                    &absmax,
                    &NF4,
                    32,
                    found.values_mut(),
                    Stores::Cached,
                )
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
    let packed = Random(1).bytes(packed_len(len));
    let absmax = scales(1, num_blocks(len, 64));
    for &bodies in available() {
        for room in Weights::room(len) {
            let run = |threads| {
                let (mut found, engine) = (room.clone(), Engine::new(bodies, threads));
                dequantize_4bit(
                    engine,
                    &packed,
                    &absmax,
                    &fp4(),
                    64,
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
fn wrong_sizes_and_tables_are_refused() {
    let engine = Engine::detect().unwrap();
    let run = |table: &[f32; 16], packed: usize, absmax: usize| {
        let (packed, absmax) = (vec![0; packed], vec![0.0; absmax]);
        let values = ValuesMut::F32(&mut [0.0; 65]);
        dequantize_4bit(engine, &packed, &absmax, table, 64, values, Stores::Cached)
    };
    assert_eq!(run(&NF4, 33, 2), Ok(()));
    let error = run(&NF4, 34, 2).unwrap_err();
    assert_eq!(error.to_string(), "packed has length 34, but 65 values need 33");
    let error = run(&NF4, 33, 1).unwrap_err();
    assert_eq!(error.to_string(), "absmax has length 1, but 65 values need 2");
    let error = run(&[f32::NAN; 16], 33, 2).unwrap_err();
    assert!(matches!(error, CodecError::TableNotFinite { index: 0, .. }));
}
