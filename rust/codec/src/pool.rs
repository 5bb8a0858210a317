//! The threads of the process, which help those that call.
//!
//! A thread that sleeps takes some 100 µs to wake, as long as all the work of a small call. So a
//! caller never waits for one that has not begun: it works, and takes back what was not fetched.
//! And a thread that has just helped looks out for more for a while before it sleeps.
//!
//! rayon's scopes wait for each job that was spawned to be fetched and run, even where no work is
//! left for it; on a busy machine that took several times as long as one thread alone.

#![allow(unsafe_code)] // the lifetime of what is lent to another thread

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// What the names of the pool's threads start with.
pub const THREAD_PREFIX: &str = "qkern-";

/// How long a thread looks out for work, or for the end of work, before it sleeps. Short: on a
/// machine with fewer processors than threads, others wait for this one.
const LOOKOUT: Duration = Duration::from_micros(50);

/// The threads of a process.
pub(crate) struct Pool {
    workers: Vec<&'static Worker>,
}

/// A thread of the pool.
struct Worker {
    /// One of the constants below.
    state: AtomicU32,
    /// Whether it would see a task at once.
    awake: AtomicBool,
    task: Mutex<Option<Task>>,
    thread: OnceLock<Thread>,
}

/// What a caller wants done, while it waits.
struct Task {
    work: &'static (dyn Fn() + Sync),
    caller: Thread,
}

/// No call uses the worker.
const IDLE: u32 = 0;
/// A call has it, but no task for it.
const TAKEN: u32 = 1;
/// There is a task, which the caller may still take back.
const POSTED: u32 = 2;
/// The worker is at the task.
const RUNNING: u32 = 3;
/// The worker has done the task; the call that took it gives it back.
const DONE: u32 = 4;

/// The threads of this process.
///
/// A fork takes the pool's memory along but not its threads: the child makes a pool of its own.
pub(crate) fn pool() -> &'static Pool {
    /// One process's pool, then those of the processes forked from it.
    #[derive(Default)]
    struct Generation {
        pool: OnceLock<(u32, Pool)>,
        child: OnceLock<Box<Generation>>,
    }
    static FIRST: Generation = Generation { pool: OnceLock::new(), child: OnceLock::new() };

    let process = std::process::id();
    let mut generation = &FIRST;
    loop {
        match generation.pool.get() {
            Some((owner, pool)) if *owner == process => return pool,
            Some(_) => generation = generation.child.get_or_init(Box::default),
            // Made before it is set: a fork amid `get_or_init` would leave the child waiting.
            None => drop(generation.pool.set((process, Pool::new()))),
        }
    }
}

impl Pool {
    /// As many threads as can run at a time, or as many as can be made.
    fn new() -> Self {
        let count = thread::available_parallelism().map_or(1, usize::from);
        Self { workers: (0..count).map_while(Worker::spawn).collect() }
    }

    /// Threads that work for a call if it does not say how many.
    pub(crate) fn size(&self) -> usize {
        self.workers.len()
    }

    /// Whether a thread would help at once.
    pub(crate) fn is_awake(&self) -> bool {
        let ready = |worker: &&Worker| {
            worker.awake.load(Ordering::Relaxed) && worker.state.load(Ordering::Relaxed) == IDLE
        };
        self.workers.iter().any(ready)
    }

    /// Runs `main` here, and `help` on up to `wanted` threads that no other call uses, if they come
    /// to it before `main` ends. Returns when all have ended.
    ///
    /// `help` must not panic.
    pub(crate) fn with_help<R>(
        &self,
        wanted: usize,
        help: &(dyn Fn() + Sync),
        main: impl FnOnce() -> R,
    ) -> R {
        // SAFETY: `helpers` ends, by a panic too, before `help` does: only then no thread has it.
        let help = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &(dyn Fn() + Sync)>(help) };
        let free = self.workers.iter().filter(|worker| worker.change(IDLE, TAKEN));
        let helpers = Helpers(free.take(wanted).copied().collect());
        for worker in &helpers.0 {
            worker.post(Task { work: help, caller: thread::current() });
        }
        let result = main();
        drop(helpers);
        result
    }
}

/// The workers of a call; dropped, they have ended.
struct Helpers(Vec<&'static Worker>);

impl Drop for Helpers {
    fn drop(&mut self) {
        for worker in &self.0 {
            worker.end();
        }
    }
}

impl Worker {
    fn spawn(index: usize) -> Option<&'static Self> {
        let worker: &'static Self = Box::leak(Box::new(Self {
            state: AtomicU32::new(IDLE),
            awake: AtomicBool::new(true),
            task: Mutex::new(None),
            thread: OnceLock::new(),
        }));
        let builder = thread::Builder::new().name(format!("{THREAD_PREFIX}{index}"));
        let handle = builder.spawn(|| worker.serve()).ok()?;
        let _first = worker.thread.set(handle.thread().clone());
        Some(worker)
    }

    /// Changes the state if it was `from`.
    fn change(&self, from: u32, to: u32) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// The life of the thread.
    fn serve(&self) {
        loop {
            self.awake.store(true, Ordering::Relaxed);
            while look_out(|| self.state.load(Ordering::Relaxed) == POSTED) {
                self.run();
            }
            self.awake.store(false, Ordering::Relaxed);
            thread::park(); // returns at once if a task came since
        }
    }

    /// Runs the task, unless it was taken back.
    fn run(&self) {
        if !self.change(POSTED, RUNNING) {
            return;
        }
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Task { work, caller }) = task {
            work();
            self.state.store(DONE, Ordering::Release); // the caller may end: only its handle is left
            caller.unpark();
        }
    }

    /// Gives a taken worker a task.
    fn post(&self, task: Task) {
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        self.state.store(POSTED, Ordering::Release);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Takes the task back, or waits for its end.
    fn end(&self) {
        if self.change(POSTED, TAKEN) {
            self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        } else {
            let done = || self.state.load(Ordering::Acquire) == DONE;
            if !look_out(done) {
                while !done() {
                    thread::park();
                }
            }
        }
        self.state.store(IDLE, Ordering::Release);
    }
}

/// Whether something happens while it is looked out for.
fn look_out(happened: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..4 {
            if happened() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() >= LOOKOUT {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// One call: how often its help ran, and that none does when it has returned.
    fn call(pool: &Pool, wanted: usize) -> usize {
        let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let help = || {
            begun.fetch_add(1, Ordering::Relaxed);
            thread::yield_now();
            ended.fetch_add(1, Ordering::Relaxed);
        };
        pool.with_help(wanted, &help, thread::yield_now);
        assert_eq!(begun.load(Ordering::Relaxed), ended.load(Ordering::Relaxed));
        begun.into_inner()
    }

    #[test]
    fn all_help_has_ended_when_a_call_returns() {
        let pool = Pool::new();
        thread::scope(|scope| {
            for wanted in [0, 1, 2, 100] {
                let pool = &pool;
                scope.spawn(move || (0..500).for_each(|_| assert!(call(pool, wanted) <= wanted)));
            }
        });
        let idle = |worker: &&Worker| worker.state.load(Ordering::Relaxed) == IDLE;
        assert!(pool.workers.iter().all(idle), "every worker was given back");
    }

    #[test]
    fn threads_without_work_sleep_and_wake_again() {
        let pool = Pool::new();
        for _ in 0..3 {
            while pool.is_awake() {
                thread::yield_now(); // the test would hang if they looked out for ever
            }
            let helped = AtomicBool::new(false);
            let help = || helped.store(true, Ordering::Relaxed);
            pool.with_help(1, &help, || {
                while !helped.load(Ordering::Relaxed) {
                    thread::yield_now(); // and here if none woke
                }
            });
        }
    }
}
