//! Errors against those of the absmax and of a long search, codes against the oracle.

use proptest::prelude::*;

use super::*;
use crate::codebook::tests::{fp4, NF4};
use crate::layout::packed_len;
use crate::oracle;
use crate::quantize::encode_4bit;
use crate::simd::available;
use crate::testing::{hard_values, lengths, shapes, tables, Random, Weights, BLOCKSIZES};

fn searched(
    engine: Engine,
    weights: &Weights,
    table: &[f32; 16],
    blocksize: usize,
    importance: Option<&[f32]>,
) -> (Vec<u8>, Vec<f32>) {
    let (len, code) = (weights.values().len(), Codebook::new(table).unwrap());
    let mut scales = vec![f32::NAN; num_blocks(len, blocksize)];
    let refuse = NonFinite::Error;
    search_scales(engine, weights.values(), &code, blocksize, importance, refuse, &mut scales)
        .unwrap();
    (encoded(engine, weights, table, blocksize, &scales), scales)
}

fn encoded(
    engine: Engine,
    weights: &Weights,
    table: &[f32; 16],
    blocksize: usize,
    scales: &[f32],
) -> Vec<u8> {
    let code = Codebook::new(table).unwrap();
    let mut packed = vec![0xab; packed_len(weights.values().len())];
    encode_4bit(engine, weights.values(), &code, blocksize, scales, &mut packed).unwrap();
    packed
}

/// The squared error of each block, weighted if weights are given.
fn errors(
    values: &[f32],
    (packed, scales): &(Vec<u8>, Vec<f32>),
    table: &[f32; 16],
    blocksize: usize,
    importance: Option<&[f32]>,
) -> Vec<f64> {
    let decoded = oracle::dequantize_4bit(packed, scales, table, blocksize, values.len());
    let weight = |i: usize| importance.map_or(1.0, |w| f64::from(w[i % w.len()]));
    let squares: Vec<f64> = (0..values.len())
        .map(|i| weight(i) * (f64::from(values[i]) - f64::from(decoded[i])).powi(2))
        .collect();
    squares.chunks(blocksize).map(|block| block.iter().sum()).collect()
}

fn check(values: &[f32], table: &[f32; 16], blocksize: usize, importance: Option<&[f32]>) {
    for weights in Weights::all(values) {
        let exact = weights.widened();
        let absmax = oracle::quantize_4bit(&exact, table, blocksize);
        let largest = errors(&exact, &absmax, table, blocksize, importance);
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = searched(engine, &weights, table, blocksize, importance);
            let errors = errors(&exact, &found, table, blocksize, importance);
            let worse = errors.iter().zip(&largest).position(|(e, most)| e > most);
            assert_eq!(worse, None, "block by {}, blocksize {blocksize}", bodies.name());
        }
    }
}

proptest! {
    #[test]
    fn no_block_is_worse_than_by_absmax((seed, blocksize, len) in shapes(), table in 0..3_usize) {
        check(&hard_values(seed, len, blocksize), &tables()[table], blocksize, None);
    }

    #[test]
    fn every_body_finds_the_same_scales((seed, blocksize, len) in shapes(), table in 0..2_usize) {
        let table = tables()[table];
        for weights in Weights::all(&hard_values(seed, len, blocksize)) {
            let mut found = available().iter().map(|bodies| {
                let scales = searched(Engine::new(bodies, 1), &weights, &table, blocksize, None).1;
                scales.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            let first = found.next().unwrap();
            prop_assert!(found.all(|scales| scales == first));
        }
    }

    #[test]
    fn nor_by_weighted_errors((seed, blocksize, rows) in shapes(), columns in 1..200_usize) {
        let mut random = Random(seed);
        let scale = 10.0_f32.powi(random.below(60) as i32 - 30);
        let importance: Vec<f32> = (0..columns)
            .map(|_| if random.below(5) == 0 { 0.0 } else { random.unit().abs() * scale })
            .collect();
        let len = columns * (rows % 30);
        check(&hard_values(seed, len, blocksize), &NF4, blocksize, Some(&importance));
    }

    #[test]
    fn codes_against_any_scales((seed, blocksize, len) in shapes(), table in 0..3_usize) {
        let mut random = Random(seed);
        let table = tables()[table];
        let scales: Vec<f32> = (0..num_blocks(len, blocksize))
            .map(|i| {
                let scale = random.unit() * 10.0_f32.powi(random.below(60) as i32 - 30);
                if i % 9 == 8 { 0.0 } else { scale }
            })
            .collect();
        for weights in Weights::all(&hard_values(seed, len, blocksize)) {
            let expected = oracle::encode_4bit(&weights.widened(), &scales, &table, blocksize);
            for &bodies in available() {
                let engine = Engine::new(bodies, 1);
                let found = encoded(engine, &weights, &table, blocksize, &scales);
                prop_assert_eq!(&found, &expected, "{}", bodies.name());
            }
        }
    }
}

#[test]
fn every_block_size_and_length() {
    for blocksize in BLOCKSIZES {
        for len in lengths(blocksize) {
            check(&hard_values(len as u64, len.min(9000), blocksize), &NF4, blocksize, None);
            check(&hard_values(len as u64, len.min(3000), blocksize), &fp4(), blocksize, None);
        }
    }
}

/// Sums of 12 uniform numbers: near enough to Gaussian.
fn gaussian(len: usize) -> Vec<f32> {
    let mut random = Random(5);
    (0..len).map(|_| (0..12).map(|_| random.unit()).sum::<f32>() / 2.0).collect()
}

#[test]
fn the_error_is_near_that_of_a_long_search() {
    let (values, blocksize) = (gaussian(1 << 14), 64);
    for table in [NF4, fp4()] {
        let code = Codebook::new(&table).unwrap();
        let long: f64 = values.chunks(blocksize).map(|block| long_search(block, &code)).sum();
        let absmax = oracle::quantize_4bit(&values, &table, blocksize);
        let absmax: f64 = errors(&values, &absmax, &table, blocksize, None).iter().sum();
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let found = searched(engine, &Weights::F32(values.clone()), &table, blocksize, None);
            let error: f64 = errors(&values, &found, &table, blocksize, None).iter().sum();
            assert!(error < 1.02 * long, "{}: {error} against {long}", bodies.name());
            assert!(error < 0.88 * absmax, "{}: {error} against {absmax}", bodies.name());
        }
    }
}

/// The least error of many scales of both signs, each with its nearest codes.
fn long_search(block: &[f32], code: &Codebook) -> f64 {
    let absmax = block.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
    let error = |scale: f32| -> f64 {
        let nearest = |u: f32| code.sorted()[code.bounds().iter().filter(|&&b| b < u).count()];
        block.iter().map(|&x| f64::from(x - scale * nearest(x / scale)).powi(2)).sum()
    };
    let trials = (120..=320).flat_map(|i| [i as f32 / 200.0, -i as f32 / 200.0]);
    trials.map(|trial| error(trial * absmax)).fold(f64::INFINITY, f64::min)
}

#[test]
fn an_exact_block_keeps_its_absmax() {
    let values: Vec<f32> = (0..640).map(|i| NF4[(i * 7) % 16] * 0.75).collect();
    for &bodies in available() {
        let engine = Engine::new(bodies, 1);
        let (_, scales) = searched(engine, &Weights::F32(values.clone()), &NF4, 64, None);
        assert_eq!(scales, [0.75; 10], "{}", bodies.name());
    }
}

#[test]
fn equal_importance_changes_nothing() {
    let weights = Weights::F32(gaussian(96 * 40));
    for &bodies in available() {
        let engine = Engine::new(bodies, 1);
        let found = searched(engine, &weights, &NF4, 64, None);
        assert_eq!(searched(engine, &weights, &NF4, 64, Some(&[3.0; 96])), found);
    }
}

#[test]
fn every_body_finds_the_same_scales_of_ordinary_values() {
    let values = gaussian(1 << 14);
    for table in [NF4, fp4()] {
        for blocksize in BLOCKSIZES {
            for weights in Weights::all(&values) {
                let run =
                    |bodies| searched(Engine::new(bodies, 1), &weights, &table, blocksize, None);
                let expected = run(available()[0]);
                assert!(expected.1.iter().filter(|s| **s < 0.0).count() > 0 || table != NF4);
                assert!(available().iter().all(|bodies| run(bodies) == expected));
            }
        }
    }
}

#[test]
fn any_number_of_threads() {
    let weights = Weights::F32(gaussian((1 << 21) + 12_345 * 100));
    let importance: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let len = weights.values().len() / 100 * 100;
    let Weights::F32(values) = weights else { unreachable!("as made above") };
    let weights = Weights::F32(values[..len].to_vec());
    let engine = |threads| Engine::new(available()[0], threads);
    let alone = searched(engine(1), &weights, &NF4, 64, Some(&importance));
    for threads in [0, 2, 7] {
        assert!(searched(engine(threads), &weights, &NF4, 64, Some(&importance)) == alone);
    }
}

#[test]
fn nan_and_infinity_are_refused_or_kept_in_their_blocks() {
    let mut values = gaussian(2048);
    for (place, bad) in [(70, f32::NAN), (1000, f32::NEG_INFINITY)] {
        values[place] = bad;
    }
    let code = Codebook::new(&NF4).unwrap();
    for weights in Weights::all(&values) {
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let mut scales = [0.0; 32];
            let run = |policy, scales: &mut [f32]| {
                search_scales(engine, weights.values(), &code, 64, None, policy, scales)
            };
            let error = run(NonFinite::Error, &mut scales).unwrap_err();
            assert_eq!(error, CodecError::NonFinite { index: 70, count: 2 });
            run(NonFinite::Keep, &mut scales).unwrap();
            let bad: Vec<usize> = (0..32).filter(|&b| !scales[b].is_finite()).collect();
            assert_eq!(bad, [1, 15], "{}", bodies.name());
            encoded(engine, &weights, &NF4, 64, &scales);
        }
    }
}

#[test]
fn half_precision_never_decodes_to_infinity() {
    let values: Vec<f32> = (0..640).map(|i| 65504.0 * (1.0 - (i % 64) as f32 / 40.0)).collect();
    for weights in Weights::all(&values) {
        let Weights::F16(_) = weights else { continue };
        for &bodies in available() {
            let engine = Engine::new(bodies, 1);
            let (packed, scales) = searched(engine, &weights, &NF4, 64, None);
            let decoded = oracle::dequantize_4bit(&packed, &scales, &NF4, 64, 640);
            assert!(decoded.iter().all(|x| x.abs() <= 65504.0), "{}", bodies.name());
        }
    }
}

#[test]
fn wrong_importance_is_refused() {
    let (code, engine) = (Codebook::new(&NF4).unwrap(), Engine::detect().unwrap());
    let values = [1.0; 96];
    let run = |weights: &[f32]| {
        let values = Values::F32(&values);
        search_scales(engine, values, &code, 32, Some(weights), NonFinite::Error, &mut [0.0; 3])
    };
    assert_eq!(run(&[]), Err(CodecError::Columns { columns: 0, values: 96 }));
    assert_eq!(run(&[1.0; 7]), Err(CodecError::Columns { columns: 7, values: 96 }));
    assert_eq!(run(&[1.0, -1.0]), Err(CodecError::Importance { index: 1, value: -1.0 }));
    assert!(matches!(run(&[f32::NAN]), Err(CodecError::Importance { index: 0, .. })));
    assert_eq!(run(&[0.0; 3]), Ok(()));
}

/// NEON adds up in the scalar body's order with importance too, which those of x86 do not.
#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::vreinterpretq_u8_f32;

    use super::*;
    use crate::neon::{load_f32, store};
    use crate::search::neon::Nearest;
    use crate::simd::Bodies;

    fn found(
        name: &str,
        weights: &Weights,
        table: &[f32; 16],
        blocksize: usize,
        importance: Option<&[f32]>,
    ) -> Vec<u32> {
        let engine = Engine::new(Bodies::named(name, "this test").unwrap(), 1);
        let (_, scales) = searched(engine, weights, table, blocksize, importance);
        scales.into_iter().map(f32::to_bits).collect()
    }

    proptest! {
        #[test]
        fn finds_the_scales_of_the_scalar_body_with_importance_and_by_any_table(
            (seed, blocksize, len) in shapes(),
            table in 0..3_usize,
            columns in 0..200_usize,
        ) {
            let mut random = Random(seed);
            let importance: Vec<f32> = (0..columns)
                .map(|_| if random.below(5) == 0 { 0.0 } else { random.unit().abs() })
                .collect();
            let importance = (columns > 0).then_some(importance.as_slice());
            let len = len / columns.max(1) * columns.max(1); // whole rows
            let values = hard_values(seed, len, blocksize);
            let table = tables()[table];
            for weights in Weights::all(&values) {
                let [neon, scalar] = ["neon", "scalar"]
                    .map(|name| found(name, &weights, &table, blocksize, importance));
                prop_assert_eq!(neon, scalar);
            }
        }
    }

    #[target_feature(enable = "neon")]
    fn nearest(code: &Codebook, u: f32) -> [f32; 4] {
        let mut found = [f32::NAN; 4];
        let vector = Nearest::new(code).of(load_f32(&[u; 4]));
        store(&mut found, vreinterpretq_u8_f32(vector));
        found
    }

    #[test]
    #[allow(unsafe_code)]
    fn takes_the_nearest_value_at_every_bound_and_beside_it() {
        for table in tables() {
            let code = Codebook::new(&table).unwrap();
            let steps = scalar::Steps::new(&code);
            let near = |x: f32| [x, x.next_up(), x.next_down()];
            let ends = [0.0, -0.0, 1.0, -1.0, 1e-30, 3.0, -3.0, 1e30, -1e30];
            let of = code.bounds().iter().chain(&ends).copied().flat_map(near);
            let of = of.chain(code.sorted().iter().copied());
            for u in of.filter(|u| u.is_finite()) {
                // SAFETY: part of every processor of this architecture that runs the tests.
                let found = unsafe { nearest(&code, u) };
                assert_eq!(found, steps.nearest([u; 4]), "{u:e}");
            }
        }
    }
}
