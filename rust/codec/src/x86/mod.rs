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

/// Fetches memory that is needed next into the second-level cache, evenly while work goes on: all
/// at once it would hold up the loads of the work.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    next: *const [u8; 4],
    /// Terms to fetch for each step of the work, times 2^16.
    rate: usize,
    /// Place of the next term, times 2^16.
    at: usize,
}

impl Ahead {
    /// For work of so many steps.
    pub(crate) fn new(next: &[impl Plain], steps: usize) -> Self {
        let rate = (next.len() << 16).checked_div(steps).unwrap_or(0);
        Self { next: next.as_ptr().cast(), rate, at: 0 }
    }

    /// Fetches the line for the present step.
    #[inline(always)]
    pub(crate) fn fetch(&self) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T1};
        let address = self.next.wrapping_add(self.at >> 16).cast::<i8>();
        // SAFETY: a prefetch reads nothing that the program sees and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address) }
    }

    /// Goes on by some steps.
    #[inline(always)]
    pub(crate) fn skip(&mut self, steps: usize) {
        self.at = self.at.wrapping_add(steps.wrapping_mul(self.rate));
    }
}
