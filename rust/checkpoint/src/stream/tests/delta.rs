//! What an adapter adds.

use super::*;

#[test]
fn a_low_rank_product_is_added_before_rounding() {
    let (row, count, rank) = (1500, 333, 5);
    let (values, a) = (weights(row * count), weights(rank * row));
    let b: Vec<f32> = weights(count * rank + 1)[1..].iter().map(|v| 0.01 * v).collect();
    let base: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let exact = |n: usize| {
        let (i, j) = (n / row, n % row);
        let sum: f64 =
            (0..rank).map(|r| f64::from(b[i * rank + r]) * f64::from(a[r * row + j])).sum();
        (f64::from(base[n]) + sum, sum)
    };
    let delta = Some(Delta { a: a.clone(), b: b.clone(), base: Dtype::F32, matrices: 1 });
    let target = Target::Dense { dtype: Dtype::F32, at: at(0) };
    let job = Job::Weight(Box::new(Weight {
        name: "w".into(),
        numel: values.len(),
        row,
        source: dense(Dtype::Bf16),
        delta,
        transposed: None,
        target,
    }));
    let (input, output) =
        (Memory::new(input(&values, Dtype::Bf16)), Memory::room(4 * values.len()));
    let (result, done, _) = stream(&[job], &input, &output, 2);
    result.unwrap();
    let mut found = vec![0.0f32; values.len()];
    cast_slice_mut(&mut found).copy_from_slice(&output.take());
    for (n, found) in found.iter().enumerate() {
        assert!((f64::from(*found) - exact(n).0).abs() < 1e-6, "{n}");
    }
    let squared: f64 = (0..values.len()).map(|n| exact(n).1.powi(2)).sum();
    let errors = done[0].errors.unwrap_or_default();
    assert!((errors.squared_delta / squared - 1.0).abs() < 1e-5, "{errors:?} {squared}");
}

/// Stacked matrices are what each is by itself; a chunk has rows of several.
#[test]
fn each_of_stacked_matrices_has_a_product_of_its_own() {
    let (row, count, rank, matrices) = (640, 210, 3, 3);
    let (values, a) = (weights(matrices * row * count), weights(matrices * rank * row));
    let b = weights(matrices * count * rank);
    let sums = |values: &[f32], a: &[f32], b: &[f32], matrices: usize| {
        let target = Target::Dense { dtype: Dtype::F32, at: at(0) };
        let Job::Weight(mut job) = weight(values.len(), row, dense(Dtype::F32), target) else {
            unreachable!()
        };
        job.delta = Some(Delta { a: a.to_vec(), b: b.to_vec(), base: Dtype::F32, matrices });
        let (input, output) =
            (Memory::new(input(values, Dtype::F32)), Memory::room(4 * values.len()));
        let (result, ..) = stream(&[Job::Weight(job)], &input, &output, 2);
        result.map(|()| output.take())
    };
    let found = sums(&values, &a, &b, matrices).unwrap();
    let parts = values.chunks(row * count).zip(a.chunks(rank * row)).zip(b.chunks(count * rank));
    let alone: Vec<u8> =
        parts.flat_map(|((values, a), b)| sums(values, a, b, 1).unwrap()).collect();
    assert!(found == alone);
    for wrong in [0, 2, 4] {
        let error = sums(&values, &a, &b, wrong).unwrap_err();
        assert!(error.to_string().contains("do not fit 630 x 640"), "{error}");
    }
}
