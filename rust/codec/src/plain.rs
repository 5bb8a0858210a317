//! What may be read and written as bytes.

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
impl_plain!(u8, i8, u32, i32, f32, f16, bf16);
// SAFETY: an array has no gaps between its elements.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}
