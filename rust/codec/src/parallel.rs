//! Work shared by threads: disjoint jobs, taken one by one, so that any number of threads writes
//! the same bytes.

use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::float_env::in_default_float_env;

/// Values in a job: whole blocks of every block size, and whole groups of 16 blocks.
pub(crate) const JOB: usize = 1 << 16;

/// Below this many values, waking a thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 21;

/// Runs `work` on every job, on up to `threads` threads (0: as many as the pool has).
///
/// The calling thread works too. `len`, the number of values in all jobs, decides whether more
/// threads are worth waking.
pub(crate) fn for_each<J, F>(len: usize, threads: usize, mut jobs: J, work: F)
where
    J: Iterator + Send,
    F: Fn(J::Item) + Sync,
{
    let pool = if threads == 1 || len < MIN_PARALLEL { None } else { pool() };
    let Some(pool) = pool else {
        return in_default_float_env(|| jobs.for_each(work));
    };
    let threads = if threads == 0 { pool.current_num_threads() } else { threads };
    let helpers = threads.min(len.div_ceil(JOB)) - 1;
    let jobs = Mutex::new(&mut jobs);
    let take = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        in_default_float_env(|| {
            while let Some(job) = take() {
                work(job);
            }
        });
    };
    pool.in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| run());
        }
        run();
    });
}

/// The threads of this process, or none in a process where there cannot be any.
///
/// A fork takes the pool's memory along but not its threads; such a child works alone, and so
/// does a process that may not start threads.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<(u32, Option<ThreadPool>)> = OnceLock::new();
    let (owner, pool) = POOL.get_or_init(|| {
        let built = ThreadPoolBuilder::new().thread_name(|i| format!("qkern-{i}")).build();
        (std::process::id(), built.ok())
    });
    pool.as_ref().filter(|_| *owner == std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_job_runs_once() {
        for threads in [0, 1, 2, 7] {
            for len in [0, 1, MIN_PARALLEL - 1, MIN_PARALLEL, 40 * JOB + 3] {
                let sum = AtomicUsize::new(0);
                let jobs = (0..len).step_by(JOB).map(|start| JOB.min(len - start));
                for_each(len, threads, jobs, |n| {
                    sum.fetch_add(n, Ordering::Relaxed);
                });
                assert_eq!(sum.into_inner(), len, "{threads} threads, {len} values");
            }
        }
    }
}
