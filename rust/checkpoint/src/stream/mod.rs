//! Weights streamed from file to file: read, converted, written, a chunk at a time.
//!
//! Every job says where its bytes lie and where the result goes, so jobs and chunks need not wait
//! for each other, and the bytes do not depend on the number of threads. Memory is some MB a
//! thread, and 4 bytes for each scale of the weights at work. Dense values are mapped, a window at a
//! time, or read by place: a file that shrinks meanwhile is an error then, and not a signal. The
//! address space does not limit the size of a file.

mod blocks;
mod check;
mod coded;
mod copy;
mod delta;
mod dense;
mod errors;
mod fill;
mod job;
mod queue;
#[cfg(test)]
mod tests;
mod values;
mod weight;

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use qkern_codec::{Engine, THREAD_PREFIX};

use crate::error::CheckpointError;
use crate::files::{self, Storage};
use copy::CopyRun;
use queue::{Passes, Queue, Task};
use weight::{Buffers, WeightRun};

pub use job::{
    Blocks, Change, Coded, Delta, Done, Dtype, Errors, Format, Job, Scale, Source, Span, Stored,
    Target, Weight,
};

/// How often whoever watches is told of progress, and asked.
const PATIENCE: Duration = Duration::from_millis(50);

/// Watches a run, on the thread that called it.
pub trait Observer {
    /// A job is done: all its bytes are written, if not yet on the disk.
    fn done(&mut self, done: Done) -> Continue;
    /// So many bytes have been read since the last call. Called some times a second.
    fn progress(&mut self, bytes: u64) -> Continue;
}

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continue {
    /// It does.
    Yes,
    /// It ends with [`CheckpointError::Stopped`].
    No,
}

/// How dense values come out of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Mapped, which saves a copy. A file that is cut meanwhile ends the process.
    Mapped,
    /// Read into memory. A file that is cut meanwhile is an error.
    Copied,
}

/// Runs `jobs` on `engine.threads` threads (0: as many as can run at a time), which begin them in
/// their order. `outputs` are there already.
///
/// # Errors
/// What a job meets first; others may be done or not, and whoever watches was told of those that
/// are. [`CheckpointError::Job`] before anything is done.
///
/// # Panics
/// If a thread did, which is a bug.
pub fn run(
    jobs: &[Job],
    inputs: &[PathBuf],
    outputs: &[PathBuf],
    engine: Engine,
    access: Access,
    observer: &mut dyn Observer,
) -> Result<(), CheckpointError> {
    let (mut reading, mut writing) = (OpenOptions::new(), OpenOptions::new());
    let inputs = open(inputs, reading.read(true))?;
    let outputs = open(outputs, writing.read(true).write(true))?;
    let files = Files { inputs: places(&inputs), outputs: places(&outputs), access };
    run_on(jobs, &files, engine, observer)
}

/// The files of a run.
struct Files<'a> {
    inputs: Vec<Place<'a>>,
    outputs: Vec<Place<'a>>,
    access: Access,
}

/// A file of a run, by its name too.
struct Place<'a> {
    path: &'a Path,
    storage: &'a dyn Storage,
}

impl Place<'_> {
    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        files::read_at(self.storage, self.path, bytes, offset)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), CheckpointError> {
        files::write_at(self.storage, self.path, bytes, offset)
    }
}

fn open<'a>(
    paths: &'a [PathBuf],
    options: &OpenOptions,
) -> Result<Vec<(&'a Path, File)>, CheckpointError> {
    let open = |path: &'a PathBuf| match options.open(path) {
        Ok(file) => Ok((path.as_path(), file)),
        Err(error) => Err(CheckpointError::io(path, "open")(error)),
    };
    paths.iter().map(open).collect()
}

fn places<'a>(files: &'a [(&'a Path, File)]) -> Vec<Place<'a>> {
    files.iter().map(|(path, file)| Place { path, storage: file }).collect()
}

/// A job at work.
enum Run<'a> {
    Copy(CopyRun<'a>),
    Weight(Box<WeightRun<'a>>),
    /// It could not begin.
    Failed(Mutex<Option<CheckpointError>>),
}

impl<'a> Run<'a> {
    fn new(index: usize, job: &'a Job, files: &'a Files<'a>, engine: Engine) -> Self {
        match job {
            Job::Copy { nbytes, change, source, target, .. } => Self::Copy(CopyRun {
                job: index,
                nbytes: *nbytes,
                change: *change,
                source: *source,
                target: *target,
                files,
                crcs: Mutex::default(),
            }),
            Job::Weight(weight) => match WeightRun::new(index, weight, files, engine) {
                Ok(run) => Self::Weight(Box::new(run)),
                Err(error) => Self::Failed(Mutex::new(Some(error))),
            },
        }
    }

    fn bytes(&self, pass: usize, chunk: usize) -> u64 {
        match self {
            Self::Copy(run) => run.bytes(chunk),
            Self::Weight(run) => run.bytes(pass, chunk),
            Self::Failed(_) => 0,
        }
    }

    fn work(
        &self,
        pass: usize,
        chunk: usize,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        match self {
            Self::Copy(run) => run.work(chunk, &mut buffers.bytes),
            Self::Weight(run) => run.work(pass, chunk, buffers),
            Self::Failed(error) => {
                let error = error.lock().unwrap_or_else(PoisonError::into_inner).take();
                Err(error.unwrap_or(CheckpointError::Stopped))
            }
        }
    }

    fn end(&self, pass: usize) -> Result<Option<Done>, CheckpointError> {
        match self {
            Self::Copy(run) => Ok(Some(run.done())),
            Self::Weight(run) => run.end(pass),
            Self::Failed(_) => Ok(None),
        }
    }
}

impl Passes for Run<'_> {
    fn chunks(&self, pass: usize) -> usize {
        match self {
            Self::Copy(run) => run.chunks(pass),
            Self::Weight(run) => run.chunks(pass),
            Self::Failed(_) => 1,
        }
    }
}

/// What threads tell the one that watches.
enum Message {
    Done(Done),
    Failed(CheckpointError),
    Panicked(Box<dyn Any + Send>),
}

/// Threads share this.
struct Shared<'a> {
    queue: Queue<'a, Run<'a>>,
    read: AtomicU64,
}

fn run_on(
    jobs: &[Job],
    files: &Files<'_>,
    engine: Engine,
    observer: &mut dyn Observer,
) -> Result<(), CheckpointError> {
    jobs.iter().try_for_each(|job| job.check(files.inputs.len(), files.outputs.len()))?;
    let threads = match engine.threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        count => count,
    };
    // Each chunk is one thread's work; whoever watches asks for signals.
    let alone = Engine::new(engine.bodies, 1);
    let open = |index: usize| Run::new(index, &jobs[index], files, alone);
    let shared = Shared { queue: Queue::new(jobs.len(), &open), read: AtomicU64::new(0) };
    thread::scope(|scope| {
        let (sender, receiver) = channel();
        for number in 0..threads {
            let (shared, sender) = (&shared, sender.clone());
            let name = format!("{THREAD_PREFIX}stream-{number}");
            let spawned = thread::Builder::new()
                .name(name)
                .spawn_scoped(scope, move || work_or_tell(shared, &sender));
            match spawned {
                Ok(_) => {}
                Err(_) if number > 0 => break, // fewer will do
                Err(error) => {
                    return Err(CheckpointError::io(Path::new("a thread"), "start")(error));
                }
            }
        }
        drop(sender);
        watch(&shared, &receiver, observer)
    })
}

/// Passes on what threads tell, until the last of them has ended.
fn watch(
    shared: &Shared<'_>,
    receiver: &Receiver<Message>,
    observer: &mut dyn Observer,
) -> Result<(), CheckpointError> {
    let mut result = Ok(());
    loop {
        let mut go_on = Continue::Yes;
        match receiver.recv_timeout(PATIENCE) {
            Ok(Message::Done(done)) if result.is_ok() => go_on = observer.done(done),
            Ok(Message::Failed(error)) if result.is_ok() => result = Err(error),
            Ok(Message::Panicked(payload)) => {
                shared.queue.stop();
                resume_unwind(payload);
            }
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if result.is_ok() && go_on == Continue::Yes {
            go_on = observer.progress(shared.read.swap(0, Ordering::Relaxed));
        }
        if go_on == Continue::No {
            shared.queue.stop();
            result = result.and(Err(CheckpointError::Stopped));
        }
    }
    if result.is_ok() && observer.progress(shared.read.swap(0, Ordering::Relaxed)) == Continue::No {
        return Err(CheckpointError::Stopped);
    }
    result
}

fn work_or_tell(shared: &Shared<'_>, sender: &Sender<Message>) {
    let worked = catch_unwind(AssertUnwindSafe(|| work(shared, sender)));
    let message = match worked {
        Ok(Ok(())) => return,
        Ok(Err(error)) => Message::Failed(error),
        Err(payload) => Message::Panicked(payload),
    };
    shared.queue.stop();
    let _ = sender.send(message); // nobody listens after another thread's panic
}

fn work(shared: &Shared<'_>, sender: &Sender<Message>) -> Result<(), CheckpointError> {
    let mut buffers = Buffers::default();
    while let Some(Task { run, pass, chunk }) = shared.queue.take() {
        run.work(pass, chunk, &mut buffers)?;
        shared.read.fetch_add(run.bytes(pass, chunk), Ordering::Relaxed);
        if !Queue::is_last(&run) {
            continue;
        }
        match run.end(pass)? {
            Some(done) => {
                let _ = sender.send(Message::Done(done));
                shared.queue.end();
            }
            None => shared.queue.push(Arc::clone(&run), pass + 1),
        }
    }
    Ok(())
}
