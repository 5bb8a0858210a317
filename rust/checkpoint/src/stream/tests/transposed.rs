//! Matrices that are stored as their transposes, and written as codes.

use super::*;

/// Neither fills stripes or cache lines, and together they are more than a chunk.
const ROWS: usize = 333;
const ROW: usize = 1002;

fn turned<T: Copy>(values: &[T], row: usize) -> Vec<T> {
    let rows = values.len() / row;
    (0..values.len()).map(|place| values[place % rows * row + place / rows]).collect()
}

fn job(rows: usize, row: usize, dtype: Dtype, target: Target, delta: Option<Delta>) -> Job {
    let Job::Weight(mut weight) = weight(rows * row, row, dense(dtype), target) else {
        unreachable!()
    };
    weight.transposed = Some(rows);
    weight.delta = delta;
    Job::Weight(weight)
}

#[test]
fn codes_are_those_of_the_transpose() {
    let values = weights(ROWS * ROW);
    let kinds = [
        (format(4, 64, true), false),
        (format(4, 64, true), true),
        (format(8, 32, false), false),
        (rows(ROWS), false),
    ];
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let source = Memory::new(input(&values, dtype));
        let read: Vec<f32> = match dtype {
            Dtype::F32 => values.clone(),
            _ => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        };
        let expected = turned(&read, ROW);
        for (format, search) in &kinds {
            let (target, len) = coded(format, values.len(), *search);
            let output = Memory::room(len);
            let job = job(ROWS, ROW, dtype, target, None);
            let (result, done, bytes) = stream(&[job], &source, &output, 2);
            result.unwrap();
            let (codes, scales, safe, offset) = whole(Values::F32(&expected), format, *search);
            let found = output.take();
            assert!(found[3..3 + codes.len()] == codes, "{format:?} {search}");
            assert!(found[3 + codes.len()..][..scales.len()] == scales, "{format:?} {search}");
            assert_eq!((done[0].double_quant, done[0].offset), (safe, offset));
            assert_eq!(bytes, (values.len() * dtype.size()) as u64);
            let errors = done[0].errors.unwrap();
            assert_eq!(errors.count, values.len() as u64);
            assert!(errors.squared_error <= 0.03 * errors.squared, "{errors:?}");
        }
    }
}

/// An adapter's part lies as the source does: it is added, then all is transposed.
#[test]
fn a_product_is_added_before_codes_and_values_are_written() {
    let (values, rank) = (weights(ROWS * ROW), 3);
    let (a, b) = (weights(rank * ROW), weights(rank * ROWS));
    let delta = || Some(Delta { a: a.clone(), b: b.clone(), base: Dtype::F32, matrices: 1 });
    let source = Memory::new(input(&values, Dtype::F32));
    let dense_target = || Target::Dense { dtype: Dtype::F32, at: at(0) };
    let run = |job: Job, len: usize| {
        let output = Memory::room(len);
        let (result, done, _) = stream(&[job], &source, &output, 2);
        result.unwrap();
        (output.take(), done[0].errors.unwrap())
    };
    let mut plain = job(ROWS, ROW, Dtype::F32, dense_target(), delta());
    if let Job::Weight(weight) = &mut plain {
        weight.transposed = None;
    }
    let (sums, errors) = run(plain, 4 * values.len());
    let sums: Vec<f32> =
        cast_slice::<u8, [u8; 4]>(&sums).iter().map(|v| f32::from_le_bytes(*v)).collect();
    let expected = turned(&sums, ROW);

    let (found, again) = run(job(ROWS, ROW, Dtype::F32, dense_target(), delta()), 4 * values.len());
    assert!(found == cast_slice::<f32, u8>(&expected));
    assert_eq!(again.count, errors.count);
    assert!((again.squared_delta / errors.squared_delta - 1.0).abs() < 1e-9);

    let format = format(4, 64, false);
    let (target, len) = coded(&format, values.len(), false);
    let (found, again) = run(job(ROWS, ROW, Dtype::F32, target, delta()), len);
    let (codes, scales, ..) = whole(Values::F32(&expected), &format, false);
    assert!(found[3..] == [codes, scales].concat());
    assert!((again.squared_delta / errors.squared_delta - 1.0).abs() < 1e-9);
}

#[test]
fn one_matrix_is_quantized_at_a_time() {
    let (target, _) = coded(&format(4, 64, false), 2 * 64 * 64, false);
    let Job::Weight(mut job) = job(64, 64, Dtype::F32, target, None) else { unreachable!() };
    job.numel *= 2;
    let files = (Memory::new(Vec::new()), Memory::room(0));
    let error = stream(&[Job::Weight(job)], &files.0, &files.1, 1).0.unwrap_err();
    assert!(error.to_string().contains("no matrices of"), "{error}");
}
