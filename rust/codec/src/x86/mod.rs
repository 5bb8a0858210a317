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
