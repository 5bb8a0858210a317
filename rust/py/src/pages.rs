//! Huge pages for fresh memory: the first write to a page costs more than all else that is written.

use pyo3::prelude::*;

use crate::arrays::Output;

/// Asks the system for huge pages under `memory`, of bytes, before it is written for the first
/// time; tells whether it agreed.
///
/// Linux only, and only advice: contents and results are the same without it.
#[pyfunction]
#[pyo3(signature = (memory))]
pub(crate) fn advise_huge_pages(memory: &Bound<'_, PyAny>) -> PyResult<bool> {
    let mut memory = Output::<u8>::new("memory", memory)?;
    Ok(advise(memory.slice()?))
}

#[cfg(target_os = "linux")]
fn advise(memory: &mut [u8]) -> bool {
    /// Of x86-64, and of aarch64 with pages of 4 KiB; where they are larger, the call may fail.
    const HUGE_PAGE: usize = 2 << 20;

    let start = memory.as_ptr().align_offset(HUGE_PAGE);
    let Some(inside) = memory.get_mut(start..) else { return false };
    let whole = inside.len() / HUGE_PAGE * HUGE_PAGE;
    if whole == 0 {
        return false;
    }
    // SAFETY: whole pages of a slice that is borrowed; the advice changes no byte of them.
    unsafe { libc::madvise(inside.as_mut_ptr().cast(), whole, libc::MADV_HUGEPAGE) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn advise(_memory: &mut [u8]) -> bool {
    false
}
