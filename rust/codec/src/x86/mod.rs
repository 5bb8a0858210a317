//! What the x86 bodies of several operations share: loads, stores, reductions and rounding.

pub(crate) mod avx2;
pub(crate) mod avx512;

use half::{bf16, f16};

/// Numbers without gaps.
///
/// # Safety
/// Any bytes must be a value, and every value must have all its bytes set.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! impl_plain {
    ($($type:ty),*) => {
        $(
            // SAFETY: a number, or a transparent wrapper of one.
            unsafe impl Plain for $type {}
        )*
    };
}
impl_plain!(u8, i8, i32, u32, f32, f16, bf16);

/// Fetches the cache line `ahead` bytes after a slice's start into L1; there may be none.
#[inline(always)]
pub(crate) fn prefetch<T>(from: &[T], ahead: usize) {
    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
    let address = from.as_ptr().cast::<i8>().wrapping_add(ahead);
    // SAFETY: a prefetch reads nothing that the program sees and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
}
