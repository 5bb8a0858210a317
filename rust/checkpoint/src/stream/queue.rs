//! Which thread does what: chunks of one pass after the other, jobs in their order.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A job at work. Its passes go over all its chunks, one after the other.
pub(super) trait Passes {
    /// Chunks of pass number `pass`, at least one.
    fn chunks(&self, pass: usize) -> usize;
}

/// A job, and how many chunks of its present pass are not done.
pub(super) struct Open<R> {
    pub(super) run: R,
    left: AtomicUsize,
}

impl<R> Deref for Open<R> {
    type Target = R;

    fn deref(&self) -> &R {
        &self.run
    }
}

/// What a thread is to do: chunk number `chunk` of pass number `pass`.
pub(super) struct Task<R> {
    pub(super) run: Arc<Open<R>>,
    pub(super) pass: usize,
    pub(super) chunk: usize,
}

/// Chunks that nobody has taken yet, and jobs that nobody has begun.
pub(super) struct Queue<'a, R> {
    state: Mutex<State<R>>,
    changed: Condvar,
    jobs: usize,
    open: &'a (dyn Fn(usize) -> R + Sync),
}

struct State<R> {
    /// Passes with chunks left, and the next chunk of each. New passes of old jobs come first.
    passes: VecDeque<(Arc<Open<R>>, usize, usize)>,
    /// The next job.
    next: usize,
    /// Jobs begun and not ended.
    at_work: usize,
    stopped: bool,
}

impl<'a, R: Passes> Queue<'a, R> {
    /// Of so many jobs; `open` begins one.
    pub(super) fn new(jobs: usize, open: &'a (dyn Fn(usize) -> R + Sync)) -> Self {
        let state = State { passes: VecDeque::new(), next: 0, at_work: 0, stopped: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), jobs, open }
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chunk; waits for passes that chunks at work may lead to. None at the end.
    pub(super) fn take(&self) -> Option<Task<R>> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some((run, pass, next)) = state.passes.front_mut() {
                let task = Task { run: Arc::clone(run), pass: *pass, chunk: *next };
                *next += 1;
                if *next == task.run.chunks(task.pass) {
                    state.passes.pop_front();
                }
                return Some(task);
            }
            if state.next < self.jobs {
                let run = (self.open)(state.next);
                let left = AtomicUsize::new(run.chunks(0));
                state.passes.push_back((Arc::new(Open { run, left }), 0, 0));
                state.next += 1;
                state.at_work += 1;
            } else if state.at_work == 0 {
                return None;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Counts a chunk of a pass as done; whether it was the last one.
    pub(super) fn is_last(run: &Open<R>) -> bool {
        // What the other chunks wrote is seen by whoever finishes the pass.
        run.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Adds another pass of a job.
    pub(super) fn push(&self, run: Arc<Open<R>>, pass: usize) {
        run.left.store(run.chunks(pass), Ordering::Release);
        self.lock().passes.push_front((run, pass, 0));
        self.changed.notify_all();
    }

    /// Counts a job as ended.
    pub(super) fn end(&self) {
        self.lock().at_work -= 1;
        self.changed.notify_all();
    }

    /// Gives no chunk out any more.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }
}
