//! Work shared by threads: disjoint jobs, taken one by one, so that any number of threads writes
//! the same bytes.
//!
//! The calling thread works too, and asks now and then whether it shall stop. It never waits for
//! work that is not its own: threads that another call holds are not counted on.

use std::any::Any;
use std::iter;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::CodecError;
use crate::float_env::in_default_float_env;
use crate::pool::pool;
use crate::simd::Engine;

/// Values in a job: whole blocks of every block size, and whole groups of 16 blocks.
pub(crate) const JOB: usize = 1 << 16;

/// Below this many values, some 30 µs of work, the hand-over to a thread that is awake costs more
/// than it saves.
const MIN_PARALLEL: usize = 1 << 17;
/// Below this many, some 500 µs, a thread that sleeps would wake too late.
const MIN_WAKE: usize = 1 << 21;

/// How long the calling thread works before it asks whether it shall stop.
const PATIENCE: Duration = Duration::from_millis(25);

/// How many threads a call may use.
pub(crate) fn threads(engine: Engine) -> usize {
    if engine.threads == 0 {
        pool().size().max(1)
    } else {
        engine.threads
    }
}

/// Runs `work` on every job, on up to `engine.threads` threads (0: as many as the pool has).
///
/// `len`, the work of all jobs in values to quantize (about a quarter of a nanosecond each),
/// decides whether more threads are worth waking.
///
/// # Errors
/// [`CodecError::Interrupted`] if `engine.interrupted` said so; some jobs were then not run.
pub(crate) fn for_each<J, F>(len: usize, engine: Engine, jobs: J, work: F) -> Result<(), CodecError>
where
    J: Iterator + Send,
    F: Fn(J::Item) + Sync,
{
    let helped = engine.threads != 1 && len >= MIN_PARALLEL;
    let pool = helped.then(pool).filter(|pool| len >= MIN_WAKE || pool.is_awake());
    let Some(pool) = pool else {
        return until_interrupted(engine, jobs, &work);
    };
    let threads = threads(engine);
    let jobs = Mutex::new(jobs);
    let take = &|| jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (stop, work) = (&AtomicBool::new(false), &work);
    let panicked: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let help = || {
        let jobs = iter::from_fn(take).take_while(|_| !stop.load(Ordering::Relaxed));
        let run = || in_default_float_env(|| jobs.for_each(work));
        if let Err(payload) = catch_unwind(AssertUnwindSafe(run)) {
            stop.store(true, Ordering::Relaxed);
            *panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    };
    let result = pool.with_help(threads.saturating_sub(1), &help, || {
        let mut result = Ok(());
        let run = || result = until_interrupted(engine, iter::from_fn(take), work);
        let ended = catch_unwind(AssertUnwindSafe(run));
        if ended.is_err() || result.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        ended.map(|()| result)
    });
    let helper = panicked.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (result, helper) {
        (Err(payload), _) | (_, Some(payload)) => resume_unwind(payload),
        (Ok(result), None) => result,
    }
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
    for_each(MIN_WAKE, engine, jobs, |()| {
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
    use std::sync::atomic::AtomicUsize;

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
            for len in [0, 1, MIN_PARALLEL, MIN_WAKE - 1, MIN_WAKE, 40 * JOB + 3] {
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
            let result = for_each(MIN_WAKE, asking, iter::repeat(()), |()| {
                std::hint::spin_loop();
            });
            assert_eq!(result, Err(CodecError::Interrupted), "{threads} threads");
            assert_eq!(ASKED.load(Ordering::Relaxed), before + 3);
            assert_eq!(total(engine(threads), MIN_WAKE), MIN_WAKE, "it works again");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_threads_stay() {
        for threads in [1, 2, 0] {
            let run = || panic_in_a_job(engine(threads), "on purpose");
            let payload = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), "on purpose");
            assert_eq!(total(engine(threads), MIN_WAKE), MIN_WAKE);
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
                assert_eq!(total(engine(0), 2 * MIN_WAKE), 2 * MIN_WAKE);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(total(engine(0), MIN_WAKE), MIN_WAKE);
    }
}
