//! Work shared by threads: disjoint jobs, taken one by one, so that any number of threads writes
//! the same bytes.
//!
//! The calling thread works too, and asks now and then whether it shall stop. It never waits for
//! work that is not its own: threads that another call holds are not counted on.

use std::iter;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::simd::Engine;

/// Values in a job: whole blocks of every block size, and whole groups of 16 blocks.
pub(crate) const JOB: usize = 1 << 16;

/// Below this many values, waking a thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 21;

/// How long the calling thread works before it asks whether it shall stop.
const PATIENCE: Duration = Duration::from_millis(25);

/// Runs `work` on every job, on up to `engine.threads` threads (0: as many as the pool has).
///
/// `len`, the number of values in all jobs, decides whether more threads are worth waking.
///
/// # Errors
/// [`CodecError::Interrupted`] if `engine.interrupted` said so; some jobs were then not run.
pub(crate) fn for_each<J, F>(len: usize, engine: Engine, jobs: J, work: F) -> Result<(), CodecError>
where
    J: Iterator + Send,
    F: Fn(J::Item) + Sync,
{
    let pool = if engine.threads == 1 || len < MIN_PARALLEL { None } else { pool() };
    let Some(pool) = pool else {
        return until_interrupted(engine, jobs, &work);
    };
    let threads = if engine.threads == 0 { pool.size() } else { engine.threads };
    let helpers = pool.reserve(threads.min(len.div_ceil(JOB)) - 1);
    let jobs = Mutex::new(jobs);
    let take = &|| jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (stop, work) = (&AtomicBool::new(false), &work);
    pool.threads.in_place_scope(|scope| {
        for reserved in helpers {
            scope.spawn(move |_| {
                let _until_done = reserved;
                let jobs = iter::from_fn(take).take_while(|_| !stop.load(Ordering::Relaxed));
                in_default_float_env(|| jobs.for_each(work));
            });
        }
        let result = until_interrupted(engine, iter::from_fn(take), work);
        stop.store(result.is_err(), Ordering::Relaxed);
        result
    })
}

/// The share of the calling thread. It asks outside of the codec's float environment: the answer
/// may run code of the caller's.
fn until_interrupted<J: Iterator>(
    engine: Engine,
    mut jobs: J,
    work: impl Fn(J::Item),
) -> Result<(), CodecError> {
    loop {
        let start = Instant::now();
        let more = in_default_float_env(|| {
            jobs.any(|job| {
                work(job);
                start.elapsed() >= PATIENCE
            })
        });
        if !more {
            return Ok(());
        }
        if (engine.interrupted)() {
            return Err(CodecError::Interrupted);
        }
    }
}

/// The threads of a process.
struct Pool {
    threads: ThreadPool,
    idle: AtomicUsize,
}

/// A thread of the pool that works for one call; dropped, it is idle again.
struct Reserved<'a>(&'a AtomicUsize);

impl Pool {
    fn new() -> Option<Self> {
        let builder = ThreadPoolBuilder::new().thread_name(|i| format!("{THREAD_PREFIX}{i}"));
        let threads = builder.build().ok()?;
        let idle = AtomicUsize::new(threads.current_num_threads());
        Some(Self { threads, idle })
    }

    fn size(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Up to `wanted` threads that no other call uses, so that a call never waits for another's
    /// end: not when it is done, and not when it is interrupted.
    fn reserve(&self, wanted: usize) -> impl Iterator<Item = Reserved<'_>> {
        let take = |idle: usize| Some(idle - wanted.min(idle));
        let found = self.idle.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let taken = found.unwrap_or_default().min(wanted);
        (0..taken).map(|_| Reserved(&self.idle))
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the names of the pool's threads start with.
pub const THREAD_PREFIX: &str = "qkern-";

/// The threads of this process, or none where there cannot be any.
///
/// A fork takes the pool's memory along but not its threads: the child makes a pool of its own.
fn pool() -> Option<&'static Pool> {
    /// One process's pool, then those of the processes forked from it.
    #[derive(Default)]
    struct Generation {
        pool: OnceLock<(u32, Option<Pool>)>,
        child: OnceLock<Box<Generation>>,
    }
    static FIRST: Generation = Generation { pool: OnceLock::new(), child: OnceLock::new() };

    let process = std::process::id();
    let mut generation = &FIRST;
    loop {
        match generation.pool.get() {
            Some((owner, pool)) if *owner == process => return pool.as_ref(),
            Some(_) => generation = generation.child.get_or_init(Box::default),
            // Made before it is set: a fork amid `get_or_init` would leave the child waiting.
            None => drop(generation.pool.set((process, Pool::new()))),
        }
    }
}

/// Panics in a job, on a thread of the pool if `engine` may use one: for the tests of those who
/// catch it.
///
/// # Errors
/// None; the type is that of every operation.
///
/// # Panics
/// Always, with `message`.
#[doc(hidden)]
pub fn panic_in_a_job(engine: Engine, message: &str) -> Result<(), CodecError> {
    let (start, caller) = (Instant::now(), std::thread::current().id());
    let panicked = AtomicBool::new(false);
    let jobs = iter::repeat(()).take_while(|()| !panicked.load(Ordering::Relaxed));
    for_each(MIN_PARALLEL, engine, jobs, |()| {
        let helper = std::thread::current().id() != caller;
        // All threads may be in use by other calls: the caller waits for one, but not for ever.
        if helper || engine.threads == 1 || start.elapsed() > Duration::from_secs(1) {
            panicked.store(true, Ordering::Relaxed);
            panic!("{message}");
        }
        std::thread::yield_now();
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use std::panic::{catch_unwind, AssertUnwindSafe};

    fn engine(threads: usize) -> Engine {
        Engine::new(available()[0], threads)
    }

    /// Runs jobs of `len` values in all; how many of these were in jobs that ran.
    fn total(engine: Engine, len: usize) -> usize {
        let sum = AtomicUsize::new(0);
        let jobs = (0..len).step_by(JOB).map(|start| JOB.min(len - start));
        let add = |n| {
            sum.fetch_add(n, Ordering::Relaxed);
        };
        for_each(len, engine, jobs, add).unwrap();
        sum.into_inner()
    }

    #[test]
    fn every_job_runs_once() {
        for threads in [0, 1, 2, 7] {
            for len in [0, 1, MIN_PARALLEL - 1, MIN_PARALLEL, 40 * JOB + 3] {
                assert_eq!(total(engine(threads), len), len, "{threads} threads");
            }
        }
    }

    #[test]
    fn endless_work_ends_when_it_is_interrupted_and_not_before() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let third_time = || ASKED.fetch_add(1, Ordering::Relaxed) % 3 == 2;
        for threads in [1, 2, 7] {
            let before = ASKED.load(Ordering::Relaxed);
            let asking = Engine { interrupted: third_time, ..engine(threads) };
            let result = for_each(MIN_PARALLEL, asking, iter::repeat(()), |()| {
                std::hint::spin_loop();
            });
            assert_eq!(result, Err(CodecError::Interrupted), "{threads} threads");
            assert_eq!(ASKED.load(Ordering::Relaxed), before + 3);
            assert_eq!(total(engine(threads), MIN_PARALLEL), MIN_PARALLEL, "it works again");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_threads_stay() {
        for threads in [1, 2, 0] {
            let run = || panic_in_a_job(engine(threads), "on purpose");
            let payload = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), "on purpose");
            assert_eq!(total(engine(threads), MIN_PARALLEL), MIN_PARALLEL);
        }
    }

    /// It would hang here if it queued for the threads that the other one holds.
    #[test]
    fn a_call_does_not_wait_for_the_end_of_another() {
        let (started, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let unfinished = iter::repeat(()).take_while(|()| !done.load(Ordering::Relaxed));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for_each(usize::MAX, engine(1000), unfinished, |()| {
                    started.store(true, Ordering::Relaxed);
                    std::thread::yield_now();
                })
            });
            while !started.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            for _ in 0..20 {
                assert_eq!(total(engine(0), 2 * MIN_PARALLEL), 2 * MIN_PARALLEL);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(total(engine(0), MIN_PARALLEL), MIN_PARALLEL);
    }
}
