//! Every body against the oracle, byte for byte.

use proptest::prelude::*;

use super::*;
use crate::oracle;
use crate::simd::available;
use crate::testing::{hard_values, row_shapes, Weights, ROWS};

type Bytes = (Vec<i8>, Vec<u32>);

fn quantized(
    engine: Engine,
    weights: &Weights,
    row: usize,
    nonfinite: NonFinite,
) -> Result<Bytes, CodecError> {
    let len = weights.values().len();
    let mut codes = vec![99; len];
    let mut absmax = vec![-1.0; num_blocks(len, row)];
    quantize_int8_rows(engine, weights.values(), row, nonfinite, &mut codes, &mut absmax)?;
    Ok((codes, absmax.iter().map(|a| a.to_bits()).collect()))
}

fn expected(weights: &Weights, row: usize) -> Bytes {
    let (codes, absmax) = oracle::quantize_int8_rows(&weights.widened(), row);
    (codes, absmax.iter().map(|a| a.to_bits()).collect())
}

fn check(values: &[f32], row: usize) {
    for weights in Weights::all(values) {
        let expected = expected(&weights, row);
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = quantized(engine, &weights, row, NonFinite::Error).unwrap();
            assert_eq!(found.1, expected.1, "{} absmax, rows of {row}", bodies.name());
            let wrong = found.0.iter().zip(&expected.0).position(|(f, e)| f != e);
            let len = values.len();
            assert_eq!(wrong, None, "{} code, {len} values in rows of {row}", bodies.name());
        }
    }
}

proptest! {
    #[test]
    fn any_values((seed, row, len) in row_shapes()) {
        check(&hard_values(seed, len, row), row);
    }
}

#[test]
fn rows_of_every_kind_of_length() {
    for row in ROWS {
        for len in [0, 1, row - 1, row, row + 1, 5 * row, 33 * row + row / 2] {
            check(&hard_values(len as u64, len, row), row);
        }
    }
}

#[test]
fn the_factor_is_bitsandbytes_and_not_the_quotient() {
    // The row's exact quotients are ties; 127 * (1 / 2794) is an ulp below 127 / 2794.
    let row: Vec<f32> = (0..127_i16).map(|i| f32::from(22 * i + 11)).chain([2794.0]).collect();
    check(&row, row.len());
    let (divided, _) = oracle::quantize_int8(&row, row.len());
    let (codes, _) = oracle::quantize_int8_rows(&row, row.len());
    assert_eq!(codes.iter().zip(divided).filter(|(&c, d)| c != *d).count(), 56);
}

#[test]
fn tiny_rows_become_zeros_and_huge_ones_stay_in_range() {
    for absmax in [SMALLEST, SMALLEST.next_down(), SMALLEST.next_up(), 1e-45, 0.0, f32::MAX, 3e38] {
        let mut values = vec![absmax * 0.5; 16 * 77 + 5];
        values.iter_mut().step_by(3).for_each(|x| *x = -absmax);
        check(&values, 77);
        check(&values, 64);
    }
}

#[test]
fn any_number_of_threads() {
    let len = 2 * (1 << 20) + 12_345;
    for row in [96, 172, JOB + 33] {
        let weights = &Weights::all(&hard_values(7, len, row))[1];
        for &bodies in available() {
            let run = |threads| {
                quantized(Engine::new(bodies, threads), weights, row, NonFinite::Error).unwrap()
            };
            let alone = run(1);
            for threads in [0, 2, 7] {
                assert!(run(threads) == alone, "{} with {threads} threads", bodies.name());
            }
        }
    }
}

#[test]
fn nonfinite_values_are_refused_or_spoil_only_their_row() {
    for row in [1, 31, 64, 100, 777] {
        let mut values = hard_values(1, 1000 + 41 * row, row);
        let last = values.len() - 1;
        (values[last], values[777], values[778]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
        for weights in Weights::all(&values) {
            let expected = expected(&weights, row);
            for &bodies in available() {
                let engine = Engine::new(bodies, 1);
                let error = quantized(engine, &weights, row, NonFinite::Error).unwrap_err();
                assert_eq!(error, CodecError::NonFinite { index: 777, count: 3 });
                let kept = quantized(engine, &weights, row, NonFinite::Keep).unwrap();
                assert!(kept == expected, "{} in rows of {row}", bodies.name());
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let engine = Engine::detect().unwrap();
    let run = |row, codes: usize, absmax: usize| {
        let (mut codes, mut absmax) = (vec![0; codes], vec![0.0; absmax]);
        let values = Values::F32(&[0.5; 65]);
        quantize_int8_rows(engine, values, row, NonFinite::Error, &mut codes, &mut absmax)
    };
    assert_eq!(run(33, 65, 2), Ok(()));
    assert_eq!(run(0, 65, 2), Err(CodecError::Row));
    let error = run(33, 64, 2).unwrap_err();
    assert_eq!(error.to_string(), "packed has length 64, but 65 values need 65");
    let error = run(33, 65, 1).unwrap_err();
    assert_eq!(error.to_string(), "absmax has length 1, but 65 values need 2");
}
