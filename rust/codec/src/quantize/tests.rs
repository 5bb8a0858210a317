//! Every body against the oracle, byte for byte.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::codebook::tests::{fp4, NF4};
use crate::oracle;
use crate::simd::available;
use crate::testing::{hard_values, lengths, shapes, tables, Random, Weights, BLOCKSIZES};

type Bytes = (Vec<u8>, Vec<u32>);

fn quantized(
    engine: Engine,
    weights: &Weights,
    table: &[f32; 16],
    blocksize: usize,
    nonfinite: NonFinite,
) -> Result<Bytes, CodecError> {
    let len = weights.values().len();
    let mut packed = vec![0xab; packed_len(len)];
    let mut absmax = vec![-1.0; num_blocks(len, blocksize)];
    let code = Codebook::new(table)?;
    quantize_4bit(engine, weights.values(), &code, blocksize, nonfinite, &mut packed, &mut absmax)?;
    Ok((packed, absmax.iter().map(|a| a.to_bits()).collect()))
}

fn expected(weights: &Weights, table: &[f32; 16], blocksize: usize) -> Bytes {
    let (packed, absmax) = oracle::quantize_4bit(&weights.widened(), table, blocksize);
    (packed, absmax.iter().map(|a| a.to_bits()).collect())
}

fn check(values: &[f32], table: &[f32; 16], blocksize: usize) {
    for weights in Weights::all(values) {
        let expected = expected(&weights, table, blocksize);
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = quantized(engine, &weights, table, blocksize, NonFinite::Error).unwrap();
            assert_eq!(found.1, expected.1, "{} absmax, blocksize {blocksize}", bodies.name());
            let wrong = found.0.iter().zip(&expected.0).position(|(f, e)| f != e);
            let len = values.len();
            assert_eq!(wrong, None, "{} byte, {len} values by {blocksize}", bodies.name());
        }
    }
}

proptest! {
    #[test]
    fn any_values((seed, blocksize, len) in shapes(), table in 0..3_usize) {
        check(&hard_values(seed, len, blocksize), &tables()[table], blocksize);
    }

    #[test]
    fn any_table(table in prop::array::uniform16(-1.5_f32..1.5), (seed, blocksize, len) in shapes()) {
        check(&hard_values(seed, len.min(2000), blocksize), &table, blocksize);
    }
}

#[test]
fn every_block_size_and_length() {
    for blocksize in BLOCKSIZES {
        for len in lengths(blocksize) {
            check(&hard_values(len as u64, len, blocksize), &NF4, blocksize);
            check(&hard_values(len as u64 + 1, len.min(9000), blocksize), &fp4(), blocksize);
        }
    }
}

#[test]
fn every_bound_and_its_neighbours() {
    for table in tables() {
        let mut values = vec![1.0];
        for bound in Codebook::new(&table).unwrap().bounds().map(|b| b.clamp(-1.0, 1.0)) {
            for s in [bound, bound.next_up(), bound.next_down(), -bound] {
                values.extend([s, -1.0, 0.0, -0.0]);
            }
        }
        for blocksize in [32, 64, 256] {
            check(&values, &table, blocksize);
        }
    }
}

#[test]
fn every_half_precision_value() {
    let all = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite());
    let values: Vec<f32> = all.map(f16::to_f32_const).collect();
    check(&values, &NF4, 64);
    check(&values, &fp4(), 32);
}

/// Bytes that bitsandbytes 0.50.2 wrote on a CPU.
#[test]
fn bytes_of_bitsandbytes() {
    let ramp = |i: i32| ((i * 37) % 71 - 35) as f32 / 16.0;
    let small = |i: i32| if (10..20).contains(&i) { ramp(i) * 1e-3 } else { ramp(i) };
    let weights = Weights::F32((0..71).map(small).collect());
    for (table, packed, absmax) in GOLDEN {
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = quantized(engine, &weights, &table(), 32, NonFinite::Error).unwrap();
            assert_eq!(found.0, packed, "{}", bodies.name());
            assert_eq!(found.1, absmax, "{}", bodies.name());
        }
    }
}

#[test]
fn any_number_of_threads() {
    let len = 3 * (1 << 20) + 12_345;
    for weights in Weights::all(&hard_values(7, len, 64)) {
        for &bodies in available() {
            let run = |threads| {
                quantized(Engine::new(bodies, threads), &weights, &NF4, 64, NonFinite::Error)
                    .unwrap()
            };
            let alone = run(1);
            for threads in [0, 2, 7] {
                assert!(run(threads) == alone, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn slices_of_any_alignment() {
    let values = hard_values(3, 2048 + 7, 64);
    let code = Codebook::new(&NF4).unwrap();
    for &bodies in available() {
        for offset in 1..7 {
            let values = &values[offset..offset + 2048];
            let (mut packed, mut absmax) = (vec![0; 1024 + offset], vec![0.0; 32]);
            (bodies.quantize_4bit)(
                Values::F32(values),
                &code,
                64,
                &mut packed[offset..],
                &mut absmax,
            );
            assert_eq!(packed[offset..], oracle::quantize_4bit(values, &NF4, 64).0);
        }
    }
}

#[test]
fn nonfinite_values_are_counted_and_the_first_is_named() {
    let mut values = hard_values(1, 5000, 64);
    (values[4990], values[777], values[778]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
    for weights in Weights::all(&values) {
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let error = quantized(engine, &weights, &NF4, 64, NonFinite::Error).unwrap_err();
            assert_eq!(error, CodecError::NonFinite { index: 777, count: 3 });
        }
    }
}

#[test]
fn kept_nonfinite_values_spoil_only_their_block() {
    let mut random = Random(5);
    for table in tables() {
        for blocksize in [32, 64, 512] {
            let mut values = hard_values(2, 40 * blocksize + 9, blocksize);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for _ in 0..3 {
                    let place = random.below(values.len());
                    values[place] = bad;
                }
            }
            *values.last_mut().unwrap() = f32::NAN; // the ragged block too
            for weights in Weights::all(&values) {
                let expected = expected(&weights, &table, blocksize);
                for &bodies in available() {
                    let engine = Engine::new(bodies, 1);
                    let found = quantized(engine, &weights, &table, blocksize, NonFinite::Keep);
                    assert!(found.unwrap() == expected, "{} by {blocksize}", bodies.name());
                }
            }
        }
    }
}

#[test]
fn the_callers_float_environment_does_not_matter() {
    let values = hard_values(9, 10_000, 64);
    for weights in Weights::all(&values) {
        let expected = expected(&weights, &NF4, 64);
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = crate::float_env::flushing_subnormals(|| {
                quantized(engine, &weights, &NF4, 64, NonFinite::Error)
            });
            assert!(found.unwrap() == expected, "{}", bodies.name());
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let engine = Engine::detect().unwrap();
    let code = Codebook::new(&NF4).unwrap();
    let run = |blocksize, packed: usize, absmax: usize| {
        let (mut packed, mut absmax) = (vec![0; packed], vec![0.0; absmax]);
        let values = Values::F32(&[0.5; 65]);
        quantize_4bit(engine, values, &code, blocksize, NonFinite::Error, &mut packed, &mut absmax)
    };
    assert_eq!(run(64, 33, 2), Ok(()));
    assert_eq!(run(48, 33, 2), Err(CodecError::Blocksize(48)));
    let error = run(64, 32, 2).unwrap_err();
    assert_eq!(error.to_string(), "packed has length 32, but 65 values need 33");
    let error = run(64, 33, 3).unwrap_err();
    assert_eq!(error.to_string(), "absmax has length 3, but 65 values need 2");
}

type Golden = (fn() -> [f32; 16], [u8; 36], [u32; 3]);

/// Table, packed codes and scales of the values of `bytes_of_bitsandbytes`.
const GOLDEN: [Golden; 2] = [
    (
        || NF4,
        [
            0x08, 0x09, 0x1a, 0x1b, 0x1c, 0x77, 0x77, 0x77, 0x77, 0x77, 0x5f, 0x6f, 0x70, 0x80,
            0x91, 0xa1, 0xb1, 0xc2, 0xd3, 0xe3, 0xe4, 0xe5, 0xf6, 0xf7, 0x08, 0x09, 0x1a, 0x1b,
            0x1c, 0x2d, 0x2d, 0x3e, 0x4e, 0x5f, 0x6f, 0x77,
        ],
        [0x400c0000, 0x40080000, 0x40040000],
    ),
    (
        fp4,
        [
            0xb1, 0xb6, 0xa7, 0xa4, 0xa4, 0x08, 0x08, 0x08, 0x08, 0x08, 0xe3, 0x93, 0x1b, 0x6b,
            0x6a, 0x7a, 0x4a, 0x5d, 0x5d, 0x2c, 0x2f, 0x2e, 0x3e, 0x30, 0xb6, 0xb6, 0xa7, 0xa4,
            0xa5, 0xd5, 0xd2, 0xc2, 0xc2, 0xf3, 0xe3, 0x90,
        ],
        [0x400c0000, 0x40080000, 0x40040000],
    ),
];
