//! Files that give and take little, that are cut or full; jobs without sense; runs that are ended.

use std::io::ErrorKind;

use super::*;

fn three_jobs(numel: usize) -> (Vec<Job>, Memory, usize) {
    let values = weights(numel);
    let (target, len) = coded(&format(4, 64, true), numel, true);
    let copy = |offset: usize| Job::Copy {
        name: "bytes".into(),
        nbytes: 4 * numel as u64,
        change: Change::None,
        source: at(8),
        target: at(offset),
    };
    let jobs =
        vec![copy(len), weight(numel, numel, dense(Dtype::F32), target), copy(len + 4 * numel)];
    (jobs, Memory::new(input(&values, Dtype::F32)), len + 8 * numel)
}

#[test]
fn files_that_give_and_take_little_at_a_time_change_nothing() {
    let (jobs, mut source, len) = three_jobs(3 * 64 * 700);
    let (mut output, expected) = (Memory::room(len), Memory::room(len));
    stream(&jobs, &source, &expected, 1).0.unwrap();
    (source.most, output.most) = (1009, 997);
    let (result, done, _) = stream(&jobs, &source, &output, 3);
    result.unwrap();
    assert!(output.take() == expected.take());
    assert_eq!(done.len(), 3);
    assert_eq!(done[0].crc, done[2].crc);
}

#[test]
fn a_full_disk_ends_the_run_wherever_it_happens() {
    let (jobs, source, len) = three_jobs(64 * 300);
    let mut failed = 0;
    for fails_at in (0..len as u64 + 997).step_by(997) {
        let output = Memory { fails_at, ..Memory::room(len) };
        match stream(&jobs, &source, &output, 2).0 {
            Ok(()) => assert!(fails_at >= len as u64 - 4 * 300),
            Err(CheckpointError::Io { path, doing: "write", source }) => {
                assert_eq!(
                    (path.as_path(), source.kind()),
                    (Path::new("out"), ErrorKind::StorageFull)
                );
                failed += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(failed > 50);
}

#[test]
fn a_file_that_ends_too_soon_is_named() {
    let (jobs, source, len) = three_jobs(64 * 300);
    let mut bytes = source.take();
    bytes.truncate(1000);
    let found = stream(&jobs, &Memory::new(bytes), &Memory::room(len), 2).0.unwrap_err();
    let text = found.to_string();
    assert!(matches!(found, CheckpointError::Corrupt { .. }), "{found:?}");
    assert!(text.starts_with("in: the file ends at byte 1000"), "{text}");
}

/// At an odd place values are copied all the same.
#[test]
fn mapped_values_give_the_same_bytes() {
    let values = weights(LENGTHS[3]);
    let folder = tempfile::tempdir().unwrap();
    let paths = ["even", "odd"].map(|name| folder.path().join(name));
    let bytes = input(&values, Dtype::F32);
    std::fs::write(&paths[0], &bytes).unwrap();
    std::fs::write(&paths[1], [&[0], &bytes[..]].concat()).unwrap();
    let (_, len) = coded(&format(4, 64, true), values.len(), false);
    let mut results = Vec::new();
    for (path, first) in paths.iter().zip([8, 9]) {
        for access in [Access::Copied, Access::Mapped] {
            let out = folder.path().join("out");
            std::fs::write(&out, vec![0; len]).unwrap();
            let (target, _) = coded(&format(4, 64, true), values.len(), false);
            let source = Source::Dense { dtype: Dtype::F32, at: at(first) };
            let jobs = [weight(values.len(), 64, source, target)];
            let mut keeper = Keeper { done: Vec::new(), bytes: 0, most: usize::MAX };
            let engine = Engine::detect().unwrap();
            let (inputs, outputs) = ([path.clone()], [out.clone()]);
            run(&jobs, &inputs, &outputs, engine, access, &mut keeper).unwrap();
            results.push(std::fs::read(&out).unwrap());
        }
    }
    assert!(results.iter().all(|result| *result == results[0]));
}

#[test]
fn whoever_watches_can_end_a_run() {
    let jobs = vec![three_jobs(64).0[0].clone(); 1000];
    let source = Memory::new(vec![0; 8 + 4 * 64]);
    let room = Memory::room(100_000);
    let (result, done, _) = stream_until(3, &jobs, &source, &room, 2);
    assert!(matches!(result, Err(CheckpointError::Stopped)), "{result:?}");
    assert_eq!(done.len(), 3);
}

#[test]
fn jobs_without_sense_are_refused_before_anything_is_done() {
    let numel = 64;
    let (good, _) = coded(&format(4, 64, true), numel, false);
    let with = |format: Format| {
        Target::Quantized(Coded {
            format,
            codes: at(0),
            scales: at(0),
            search: true,
            measure: false,
        })
    };
    let elsewhere = Span { file: 1, offset: 0 };
    let endless = Span { file: 0, offset: u64::MAX - 3 };
    let source = |at| Source::Dense { dtype: Dtype::F32, at };
    for (job, says) in [
        (weight(numel, 64, source(elsewhere), good.clone()), "no file 1"),
        (weight(numel, 64, source(endless), good.clone()), "end nowhere"),
        (weight(usize::MAX, 64, source(at(0)), good.clone()), "end nowhere"),
        (weight(numel, 64, source(at(0)), with(format(4, 0, false))), "blocksize 0"),
        (weight(numel, 64, source(at(0)), with(format(4, 48, false))), "blocksize 48"),
        (weight(numel, 64, source(at(0)), with(rows(32))), "blocksize 32"),
        (weight(numel, 64, source(at(0)), with(format(8, 64, false))), "4 bits only"),
        (weight(numel, usize::MAX, source(at(0)), good), "rows of"),
    ] {
        let output = Memory::room(1000);
        let input = Memory::new(vec![0; 1000]);
        let (result, done, _) = stream(&[three_jobs(1).0[0].clone(), job], &input, &output, 1);
        let found = result.unwrap_err();
        assert!(matches!(found, CheckpointError::Job { .. }), "{found:?}");
        assert!(found.to_string().contains(says), "{found}");
        assert!(done.is_empty());
        assert!(output.take() == vec![0xa5; 1000]);
    }
}
