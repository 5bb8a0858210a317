//! Native work without the GIL: interrupted by signals, and panics made exceptions.

use std::any::Any;
use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::{Mutex, Once, PoisonError};

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qkern_codec::{CodecError, THREAD_PREFIX};

use crate::errors;

#[cfg(not(panic = "unwind"))]
compile_error!("a panic must unwind: to abort would end the Python process");

thread_local! {
    /// Whether this thread is at native work.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
    /// Whether native work on this thread asks for signals, once it knows.
    static ASKS: Cell<Option<bool>> = const { Cell::new(None) };
    /// What a signal's handler raised during native work.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Runs `work` without the GIL.
///
/// A panic in it, on any thread, becomes `NativeError`: `except Exception` sees that, but not the
/// `PanicException` that a panic is otherwise.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, CodecError> + Send,
) -> PyResult<T> {
    ASKS.set(None); // after a fork another thread may be the main one
    match caught(py, work)? {
        Ok(value) => Ok(value),
        Err(CodecError::Interrupted) => {
            Err(RAISED.take().unwrap_or_else(|| PyKeyboardInterrupt::new_err(())))
        }
        Err(error) => Err(errors::codec(py, &error)),
    }
}

/// Runs `work` without the GIL; whatever it returns, or `NativeError` for a panic.
pub(crate) fn caught<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    let outer = AT_WORK.replace(true);
    // A panic leaves unspecified numbers in the outputs, as any error does, and nothing else.
    let result = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    AT_WORK.set(outer);
    result.map_err(|payload| errors::panic(py, &text_of(payload.as_ref())))
}

/// Asked during long work: runs the handlers of signals that arrived; whether one of them raised.
///
/// Python runs handlers on its main thread only. Other threads find that out once a call and then
/// leave the GIL alone.
pub(crate) fn signal_raised() -> bool {
    let ask = |py: Python<'_>| {
        py.check_signals()?;
        if ASKS.get().is_none() {
            ASKS.set(Some(on_main_thread(py)?));
        }
        Ok::<(), PyErr>(())
    };
    // At the end of the interpreter there is nobody to ask.
    let raised = if ASKS.get() == Some(false) { None } else { Python::try_attach(ask) };
    let raised = raised.and_then(Result::err);
    let any = raised.is_some();
    RAISED.set(raised);
    any
}

fn on_main_thread(py: Python<'_>) -> PyResult<bool> {
    static MAIN_THREAD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static GET_IDENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

    let main = MAIN_THREAD.import(py, "threading", "main_thread")?.call0()?.getattr("ident")?;
    main.eq(GET_IDENT.import(py, "threading", "get_ident")?.call0()?)
}

/// The text of the last panic in native work, with its place, until someone raises it.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps the text of panics in native work for the exception, where it would be printed twice.
pub(crate) fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let helps = thread.name().is_some_and(|name| name.starts_with(THREAD_PREFIX));
            if helps || AT_WORK.try_with(Cell::get).unwrap_or_default() {
                let text = info.to_string().replacen(":\n", ": ", 1);
                *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
            } else {
                print(info);
            }
        }));
    });
}

/// What a panic said and where; without the place if another panic came in between.
fn text_of(payload: &(dyn Any + Send)) -> String {
    let kept = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    let message = payload.downcast_ref::<String>().map(String::as_str);
    let message = message.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("panicked");
    kept.filter(|text| text.ends_with(message)).unwrap_or_else(|| message.to_owned())
}
