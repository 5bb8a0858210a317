//! Every body against the oracle, byte for byte.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::float_env::flushing_subnormals;
use crate::oracle;
use crate::simd::available;
use crate::testing::{hard_values, lengths, shapes, Weights, BLOCKSIZES};

type Bytes = (Vec<i8>, Vec<u32>);

fn quantized(
    engine: Engine,
    weights: &Weights,
    blocksize: usize,
    nonfinite: NonFinite,
) -> Result<Bytes, CodecError> {
    let len = weights.values().len();
    let mut codes = vec![99; len];
    let mut absmax = vec![-1.0; num_blocks(len, blocksize)];
    quantize_int8(engine, weights.values(), blocksize, nonfinite, &mut codes, &mut absmax)?;
    Ok((codes, absmax.iter().map(|a| a.to_bits()).collect()))
}

fn expected(weights: &Weights, blocksize: usize) -> Bytes {
    let (codes, absmax) = oracle::quantize_int8(&weights.widened(), blocksize);
    (codes, absmax.iter().map(|a| a.to_bits()).collect())
}

fn check(values: &[f32], blocksize: usize) {
    for weights in Weights::all(values) {
        let expected = expected(&weights, blocksize);
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = quantized(engine, &weights, blocksize, NonFinite::Error).unwrap();
            assert_eq!(found.1, expected.1, "{} absmax, blocksize {blocksize}", bodies.name());
            let wrong = found.0.iter().zip(&expected.0).position(|(f, e)| f != e);
            let len = values.len();
            assert_eq!(wrong, None, "{} code, {len} values by {blocksize}", bodies.name());
        }
    }
}

proptest! {
    #[test]
    fn any_values((seed, blocksize, len) in shapes()) {
        check(&hard_values(seed, len, blocksize), blocksize);
    }
}

#[test]
fn codes_written_past_the_caches_are_the_same_at_any_place() {
    let (blocksize, len) = (64, 64 * 37);
    for weights in Weights::all(&hard_values(1, len, blocksize)) {
        let expected = expected(&weights, blocksize).0;
        for &bodies in available() {
            for place in [0, 1, 16, 32, 63] {
                let (mut room, mut absmax) = (vec![99; len + 128], vec![0.0; len / blocksize]);
                let codes = &mut room[place..place + len];
                let values = weights.values();
                (bodies.quantize_int8)(values, blocksize, Stores::Streaming, codes, &mut absmax);
                assert_eq!(codes, expected, "{} at {place}", bodies.name());
                let around = room[..place].iter().chain(&room[place + len..]);
                assert!(around.copied().all(|byte| byte == 99), "{} at {place}", bodies.name());
            }
        }
    }
}

#[test]
fn every_block_size_and_length() {
    for blocksize in BLOCKSIZES {
        for len in lengths(blocksize) {
            check(&hard_values(len as u64, len, blocksize), blocksize);
        }
    }
}

#[test]
fn halves_round_to_even() {
    // absmax 127 makes the factor 1, so that every x.5 is a tie.
    let values: Vec<f32> = (-254..=254_i16).rev().map(|i| f32::from(i) / 2.0).collect();
    check(&values, 1024);
    let engine = Engine::detect().unwrap();
    let weights = Weights::F32(vec![127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]);
    let (codes, _) = quantized(engine, &weights, 32, NonFinite::Error).unwrap();
    assert_eq!(codes, [127, 0, 2, 2, 0, -2, -126, 126]);
}

#[test]
fn every_half_precision_value() {
    let all = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite());
    check(&all.map(f16::to_f32_const).collect::<Vec<_>>(), 64);
}

#[test]
fn tiny_blocks_become_zeros_but_keep_their_scale() {
    for absmax in [SMALLEST, SMALLEST.next_down(), SMALLEST.next_up(), 1e-45, 0.0] {
        let mut values = vec![absmax * 0.5; 16 * 64 + 5];
        values.iter_mut().step_by(3).for_each(|x| *x = -absmax);
        check(&values, 64);
    }
}

#[test]
fn the_callers_float_environment_does_not_matter() {
    for weights in Weights::all(&hard_values(9, 10_000, 64)) {
        let expected = expected(&weights, 64);
        for &bodies in available() {
            let engine = Engine { bodies, ..Engine::detect().unwrap() };
            let found =
                flushing_subnormals(|| quantized(engine, &weights, 64, NonFinite::Error).unwrap());
            assert!(found == expected, "{}", bodies.name());
        }
    }
}

#[test]
fn any_number_of_threads() {
    let len = 3 * (1 << 20) + 12_345;
    for weights in Weights::all(&hard_values(7, len, 64)) {
        for &bodies in available() {
            let run = |threads| {
                quantized(Engine::new(bodies, threads), &weights, 64, NonFinite::Error).unwrap()
            };
            let alone = run(1);
            for threads in [0, 2, 7] {
                assert!(run(threads) == alone, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn nonfinite_values_are_refused_or_spoil_only_their_block() {
    for blocksize in [32, 64, 512] {
        let mut values = hard_values(1, 41 * blocksize + 9, blocksize);
        let last = values.len() - 1;
        (values[last], values[777], values[778]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
        for weights in Weights::all(&values) {
            let expected = expected(&weights, blocksize);
            for &bodies in available() {
                let engine = Engine::new(bodies, 1);
                let error = quantized(engine, &weights, blocksize, NonFinite::Error).unwrap_err();
                assert_eq!(error, CodecError::NonFinite { index: 777, count: 3 });
                let kept = quantized(engine, &weights, blocksize, NonFinite::Keep).unwrap();
                assert!(kept == expected, "{} by {blocksize}", bodies.name());
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let engine = Engine::detect().unwrap();
    let run = |blocksize, codes: usize, absmax: usize| {
        let (mut codes, mut absmax) = (vec![0; codes], vec![0.0; absmax]);
        let values = Values::F32(&[0.5; 65]);
        quantize_int8(engine, values, blocksize, NonFinite::Error, &mut codes, &mut absmax)
    };
    assert_eq!(run(64, 65, 2), Ok(()));
    assert_eq!(run(0, 65, 2), Err(CodecError::Blocksize(0)));
    let error = run(64, 33, 2).unwrap_err();
    assert_eq!(error.to_string(), "packed has length 33, but 65 values need 65");
    let error = run(64, 65, 1).unwrap_err();
    assert_eq!(error.to_string(), "absmax has length 1, but 65 values need 2");
}
