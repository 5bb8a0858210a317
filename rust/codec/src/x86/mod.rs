//! What the x86 bodies of several operations share: loads, stores, reductions and rounding.

pub(crate) mod avx2;
pub(crate) mod avx512;

pub(crate) use crate::plain::Plain;

/// Fetches the cache line `ahead` bytes after a slice's start into L1; there may be none.
#[inline(always)]
pub(crate) fn prefetch<T>(from: &[T], ahead: usize) {
    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
    let address = from.as_ptr().cast::<i8>().wrapping_add(ahead);
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
}

/// Fetches the cache line `ahead` bytes after a slice's start into L2; there may be none.
///
/// From far ahead, for what comes from memory: the few buffers that L1 has for lines on their way
/// are then free for lines that are in L2.
#[inline(always)]
pub(crate) fn prefetch_l2<T>(from: &[T], ahead: usize) {
    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T1};
    let address = from.as_ptr().cast::<i8>().wrapping_add(ahead);
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address) }
}

/// Orders the stores of a stream before all that follow: no other thread may see that the work is
/// done before it can see the values.
#[inline(always)]
pub(crate) fn end_stream() {
    if !cfg!(miri) {
        // SAFETY: every x86-64 processor has SSE.
        unsafe { std::arch::x86_64::_mm_sfence() }
    }
}
