//! Scales in 8 bits against a plain statement of the rules.

use proptest::prelude::*;

use super::*;
use crate::float_env::flushing_subnormals;
use crate::simd::available;
use crate::testing::{hard_values, Random};

fn engine(threads: usize) -> Engine {
    Engine::new(available()[0], threads)
}

/// The signed dynamic map: 127 negative values, 0, 127 positive ones and 1.
fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let count = 1 << decade;
        let point = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(count);
        for i in 0..count {
            let mean = f64::midpoint(point(i), point(i + 1)) * 10.0_f64.powi(decade - 6);
            values.extend([mean as f32, -mean as f32]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().unwrap()
}

/// The place of the nearest value, by looking at every midpoint.
fn nearest(value: f32, table: &[f32; 256]) -> u8 {
    let below = |pair: &&[f32]| (pair[0] + pair[1]) / 2.0 < value;
    table.windows(2).take_while(below).count() as u8
}

fn encode(absmax: &[f32], table: &[f32; 256]) -> (Vec<u8>, Vec<f32>, NestedScales) {
    let run = |bodies| {
        let mut codes = vec![0xab; absmax.len()];
        let mut nested = vec![-1.0; absmax.len().div_ceil(256)];
        let engine = Engine::new(bodies, 1);
        let scales = quantize_absmax(engine, absmax, table, &mut codes, &mut nested).unwrap();
        (codes, nested, scales)
    };
    let bits = |nested: &[f32]| nested.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
    let (codes, nested, scales) = run(available()[available().len() - 1]);
    for &bodies in available() {
        let found = run(bodies);
        assert_eq!(found.0, codes, "{}", bodies.name());
        assert_eq!(bits(&found.1), bits(&nested), "{}", bodies.name());
        assert_eq!(found.2.safe, scales.safe, "{}", bodies.name());
    }
    (codes, nested, scales)
}

fn decode_all(codes: &[u8], table: &[f32; 256], nested: &[f32], offset: f32) -> Vec<f32> {
    let mut absmax = vec![f32::NAN; codes.len()];
    dequantize_absmax(engine(1), codes, table, nested, offset, &mut absmax).unwrap();
    absmax
}

fn expected_offset(absmax: &[f32]) -> f32 {
    let sums = absmax.chunks(256).map(|g| g.iter().fold(0.0, |s, &a| s + f64::from(a)));
    let total: f64 = sums.fold(0.0, |s, g| s + g);
    if absmax.is_empty() || absmax.iter().any(|&a| a < 0.0) {
        0.0
    } else {
        (total / absmax.len() as f64) as f32
    }
}

fn check(absmax: &[f32], table: &[f32; 256]) {
    let (codes, nested, scales) = encode(absmax, table);

    let mean = expected_offset(absmax);
    assert_eq!(scales.offset.to_bits(), mean.to_bits());

    let mut safe = true;
    let decoded = decode_all(&codes, table, &nested, mean);
    for (i, &a) in absmax.iter().enumerate() {
        let group = &absmax[i / 256 * 256..absmax.len().min((i / 256 + 1) * 256)];
        let largest = group.iter().map(|a| (a - mean).abs()).fold(0.0, f32::max);
        assert_eq!(nested[i / 256], largest);
        let normalised = if largest == 0.0 { 0.0 } else { (a - mean) / largest };
        assert_eq!(codes[i], nearest(normalised, table), "scale {i} of {}", absmax.len());
        let product: f32 = table[usize::from(codes[i])] * largest;
        assert_eq!(decoded[i].to_bits(), (product + mean).to_bits());
        let same_sign = decoded[i] != 0.0 && decoded[i].signum() == a.signum();
        safe &= a == 0.0 || (same_sign && (decoded[i] - a).abs() <= a.abs() / 8.0);
    }
    assert_eq!(scales.safe, safe);
}

proptest! {
    #[test]
    fn any_scales(seed in any::<u64>(), len in 0..2000_usize, spread in 0.0..6.0_f32) {
        let mut random = Random(seed);
        let scale = |_| 10.0_f32.powf(spread * random.unit()) * random.unit().abs();
        check(&(0..len).map(scale).collect::<Vec<_>>(), &dynamic_map());
    }

    #[test]
    fn hard_scales(seed in any::<u64>(), len in 0..2000_usize) {
        let magnitudes: Vec<f32> = hard_values(seed, len, 100).iter().map(|a| a * 1e-3).collect();
        check(&magnitudes, &dynamic_map());
    }

    #[test]
    fn any_table(seed in any::<u64>(), len in 0..600_usize) {
        let mut random = Random(seed);
        let mut table: [f32; 256] = core::array::from_fn(|_| random.unit() * 1.5);
        if seed % 2 == 0 {
            table = table.map(|v| v * v * v * 1e-3); // crowded near zero
        }
        table.sort_by(f32::total_cmp);
        check(&(0..len).map(|_| random.unit()).collect::<Vec<_>>(), &table);
    }
}

#[test]
fn every_midpoint_and_its_neighbours() {
    let table = dynamic_map();
    let search = prepare(&table).unwrap();
    let count = |value: f32| {
        let mut found = [0];
        search.count_below(&[value], &mut found);
        found[0]
    };
    for i in 0..255 {
        let midpoint = (table[i] + table[i + 1]) / 2.0;
        for value in [midpoint, midpoint.next_up(), midpoint.next_down()] {
            assert_eq!(count(value), nearest(value, &table), "at {value:e}");
        }
    }
    for value in [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30] {
        assert_eq!(count(value), nearest(value, &table), "at {value:e}");
    }
    assert_eq!(count(0.0), 127);
    assert_eq!(search.most(), 1, "one comparison is enough for this table");
}

#[test]
fn any_number_of_threads() {
    let len = 3 * (1 << 20) + 12_345;
    let mut random = Random(3);
    let absmax: Vec<f32> = (0..len).map(|_| random.unit().abs()).collect();
    let run = |threads| {
        let (mut codes, mut nested) = (vec![0xab; len], vec![-1.0; len.div_ceil(256)]);
        let (engine, table) = (engine(threads), dynamic_map());
        let scales = quantize_absmax(engine, &absmax, &table, &mut codes, &mut nested).unwrap();
        let mut back = vec![f32::NAN; len];
        dequantize_absmax(engine, &codes, &table, &nested, scales.offset, &mut back).unwrap();
        (codes, nested, scales, back)
    };
    let alone = run(1);
    for threads in [0, 2, 7] {
        assert!(run(threads) == alone, "{threads} threads");
    }
    assert_eq!(alone.2.offset.to_bits(), expected_offset(&absmax).to_bits());
}

#[test]
fn the_float_environment_of_the_caller_does_not_matter() {
    for scale in [1e-38, 1e-40] {
        let mut random = Random(5);
        let absmax: Vec<f32> = (0..1000).map(|_| random.unit().abs() * scale).collect();
        let run = || {
            let (codes, nested, scales) = encode(&absmax, &dynamic_map());
            let back = decode_all(&codes, &dynamic_map(), &nested, scales.offset);
            (codes, nested, scales, back)
        };
        assert!(run() == flushing_subnormals(run), "scales around {scale:e}");
    }
}

#[test]
fn equal_scales_survive_exactly() {
    for len in [1, 2, 255, 256, 257, 1000] {
        let (codes, nested, scales) = encode(&vec![0.03; len], &dynamic_map());
        assert!(codes.iter().all(|&code| code == 127));
        assert!(nested.iter().all(|&n| n == 0.0));
        assert_eq!(scales, NestedScales { offset: 0.03, safe: true });
    }
}

#[test]
fn no_scales_are_safe() {
    let (_, _, scales) = encode(&[], &dynamic_map());
    assert_eq!(scales, NestedScales { offset: 0.0, safe: true });
}

#[test]
fn a_small_scale_among_large_ones_is_not_safe() {
    let mut absmax = vec![1.0; 512];
    assert!(encode(&absmax, &dynamic_map()).2.safe);
    absmax[300] = 1e-6;
    assert!(!encode(&absmax, &dynamic_map()).2.safe);
    absmax[300] = 0.0; // a block of zeros decodes to zeros whatever its scale
    assert!(encode(&absmax, &dynamic_map()).2.safe);
}

#[test]
fn bodies_that_look_at_the_least_scale_alone_say_the_same() {
    for unit in [1.0, 1e-37, 1e-39, 1e-44] {
        for i in 0..400 {
            let mut absmax = vec![unit; 512];
            absmax[70] = unit * (0.01 + 0.0005 * i as f32);
            check(&absmax, &dynamic_map());
        }
    }
}

#[test]
fn nonfinite_scales_are_not_safe() {
    for bad in [f32::NAN, f32::INFINITY] {
        for place in 0..300 {
            let mut absmax = vec![1.0; 300];
            absmax[place] = bad;
            assert!(!encode(&absmax, &dynamic_map()).2.safe, "{bad} at {place}");
        }
    }
}

#[test]
fn wrong_sizes_and_tables_are_refused() {
    let table = dynamic_map();
    let one = engine(1);
    let error =
        quantize_absmax(one, &[1.0; 300], &table, &mut [0; 300], &mut [0.0; 1]).unwrap_err();
    assert_eq!(error.to_string(), "nested_absmax has length 1, but 300 scales need 2");
    let mut absmax = [0.0; 300];
    let error = dequantize_absmax(one, &[0; 299], &table, &[0.0; 2], 0.0, &mut absmax).unwrap_err();
    assert_eq!(error.to_string(), "codes has length 299, but 300 scales need 300");
    for (index, value) in [(5, 2.0), (0, f32::NAN), (255, f32::INFINITY)] {
        let mut wrong = table;
        wrong[index] = value;
        let error = quantize_absmax(one, &[], &wrong, &mut [], &mut []).unwrap_err();
        let index = if index == 5 { 6 } else { index };
        assert_eq!(error, CodecError::TableNotAscending { index });
    }
}
