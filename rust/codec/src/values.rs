//! Weights in one of the three dtypes that have a codec.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::CodecError;
use crate::parallel::{self, JOB};
use crate::simd::Engine;

/// What to do with NaN and infinity among the values to quantize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// Refuse the call; what the outputs hold is then unspecified.
    #[default]
    Error,
    /// Code them, with the damage confined to their own blocks: the scale becomes NaN or infinity.
    Keep,
}

/// Values to quantize.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Where dequantized values go.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

/// How dequantized values are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stores {
    /// Through the caches: for small outputs, and for fresh memory, whose pages the system has just
    /// filled with zeros in the caches.
    #[default]
    Cached,
    /// Past the caches, which saves reading what is overwritten: for large memory in use before.
    /// Bodies without such stores, and places that are not aligned to 16 bytes, write as above.
    Streaming,
}

impl Stores {
    /// Bytes of output that may well stay in a core's own cache.
    const CACHED: usize = 2 << 20;

    /// The better way to write values into memory that was in use before.
    pub fn for_reused(values: &ValuesMut<'_>) -> Self {
        Self::for_bytes(values.bytes())
    }

    /// The same for so many bytes.
    pub(crate) fn for_bytes(bytes: usize) -> Self {
        if bytes > Self::CACHED {
            Self::Streaming
        } else {
            Self::Cached
        }
    }
}

/// Runs the same expression on whichever slice a [`Values`] or [`ValuesMut`] holds.
macro_rules! with_slice {
    ($values:expr, $kind:ident, $slice:ident => $body:expr) => {
        match $values {
            $crate::values::$kind::F32($slice) => $body,
            $crate::values::$kind::F16($slice) => $body,
            $crate::values::$kind::Bf16($slice) => $body,
        }
    };
}
pub(crate) use with_slice;

impl<'a> Values<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        with_slice!(self, Values, v => v.len())
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values before and from `mid`.
    pub(crate) fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::F32(v) => pair(v.split_at(mid), Values::F32),
            Self::F16(v) => pair(v.split_at(mid), Values::F16),
            Self::Bf16(v) => pair(v.split_at(mid), Values::Bf16),
        }
    }

    /// The values at these places.
    pub(crate) fn range(self, places: Range<usize>) -> Self {
        self.split_at(places.end).0.split_at(places.start).1
    }

    /// Consecutive pieces of `size` values, the last of which may be shorter.
    pub(crate) fn chunks(self, size: usize) -> impl Iterator<Item = Values<'a>> + Send {
        let mut rest = self;
        std::iter::from_fn(move || {
            let (chunk, others) = rest.split_at(size.min(rest.len()));
            rest = others;
            (!chunk.is_empty()).then_some(chunk)
        })
    }

    /// The error that names the values which are NaN or infinite.
    pub(crate) fn nonfinite_error(self, engine: Engine) -> CodecError {
        let (first, total) = (AtomicUsize::new(self.len()), AtomicUsize::new(0));
        let jobs = self.chunks(JOB).enumerate();
        let run = parallel::for_each(self.len(), engine, jobs, |(job, values)| {
            let (index, count) = with_slice!(values, Values, v => find_nonfinite(v));
            if count > 0 {
                first.fetch_min(job * JOB + index, Ordering::Relaxed);
                total.fetch_add(count, Ordering::Relaxed);
            }
        });
        match run {
            Ok(()) => {
                CodecError::NonFinite { index: first.into_inner(), count: total.into_inner() }
            }
            Err(interrupted) => interrupted,
        }
    }
}

impl<'a> ValuesMut<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        with_slice!(self, ValuesMut, v => v.len())
    }

    /// Number of bytes.
    fn bytes(&self) -> usize {
        with_slice!(self, ValuesMut, v => size_of_val(&**v))
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values before and from `mid`.
    pub(crate) fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::F32(v) => pair(v.split_at_mut(mid), ValuesMut::F32),
            Self::F16(v) => pair(v.split_at_mut(mid), ValuesMut::F16),
            Self::Bf16(v) => pair(v.split_at_mut(mid), ValuesMut::Bf16),
        }
    }

    /// Consecutive pieces of `size` values, the last of which may be shorter.
    pub(crate) fn chunks(self, size: usize) -> impl Iterator<Item = ValuesMut<'a>> + Send {
        let mut rest = self;
        std::iter::from_fn(move || {
            let whole = std::mem::replace(&mut rest, ValuesMut::F32(&mut []));
            let mid = size.min(whole.len());
            let (chunk, others) = whole.split_at(mid);
            rest = others;
            (!chunk.is_empty()).then_some(chunk)
        })
    }
}

fn pair<S, V>((left, right): (S, S), wrap: impl Fn(S) -> V) -> (V, V) {
    (wrap(left), wrap(right))
}

fn find_nonfinite<T: Element>(values: &[T]) -> (usize, usize) {
    let mut found = values.iter().enumerate().filter(|(_, v)| !v.is_finite());
    found.next().map_or((0, 0), |(index, _)| (index, 1 + found.count()))
}

/// A NaN made quiet and cut to the bits that survive in bfloat16; any other value as it is.
///
/// Scales that are NaN go through this before they are multiplied, so that rounding the product
/// cannot overflow it.
pub(crate) fn plain_nan(scale: f32) -> f32 {
    if scale.is_nan() {
        f32::from_bits((scale.to_bits() & 0xffff_0000) | 0x0040_0000)
    } else {
        scale
    }
}

/// A dtype that has a codec.
pub(crate) trait Element: Copy + Send + Sync {
    /// Zero.
    const ZERO: Self;
    /// The largest finite value.
    const MAX: f32;
    /// Whether the value is neither NaN nor infinite.
    fn is_finite(self) -> bool;
    /// Widens a slice, exactly.
    fn widen(from: &[Self], to: &mut [f32]);
    /// The slice as floats, in `room` if they are not floats yet.
    fn widened<'a>(from: &'a [Self], room: &'a mut [f32]) -> &'a [f32];
    /// The slice itself, if it is of this dtype.
    fn floats(slice: &mut [f32]) -> Option<&mut [Self]>;
    /// Rounds a slice to nearest, ties to even.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// The slice with its dtype.
    fn values(slice: &[Self]) -> Values<'_>;
    /// The slice with its dtype.
    fn values_mut(slice: &mut [Self]) -> ValuesMut<'_>;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    const MAX: f32 = f32::MAX;
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn widened<'a>(from: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        from
    }
    fn floats(slice: &mut [f32]) -> Option<&mut [Self]> {
        Some(slice)
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn values(slice: &[Self]) -> Values<'_> {
        Values::F32(slice)
    }
    fn values_mut(slice: &mut [Self]) -> ValuesMut<'_> {
        ValuesMut::F32(slice)
    }
}

macro_rules! impl_element {
    ($type:ty, $kind:ident) => {
        impl Element for $type {
            const ZERO: Self = <$type>::ZERO;
            const MAX: f32 = <$type>::MAX.to_f32_const();
            fn is_finite(self) -> bool {
                <$type>::is_finite(self)
            }
            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }
            fn widened<'a>(from: &'a [Self], room: &'a mut [f32]) -> &'a [f32] {
                let room = &mut room[..from.len()];
                Self::widen(from, room);
                room
            }
            fn floats(_: &mut [f32]) -> Option<&mut [Self]> {
                None
            }
            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
            }
            fn values(slice: &[Self]) -> Values<'_> {
                Values::$kind(slice)
            }
            fn values_mut(slice: &mut [Self]) -> ValuesMut<'_> {
                ValuesMut::$kind(slice)
            }
        }
    };
}
impl_element!(f16, F16);
impl_element!(bf16, Bf16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_once() {
        let v: Vec<f32> = (0..10_u8).map(f32::from).collect();
        let lens: Vec<usize> = Values::F32(&v).chunks(4).map(|c| c.len()).collect();
        assert_eq!(lens, [4, 4, 2]);
        assert_eq!(Values::F32(&[]).chunks(4).count(), 0);

        let mut v = vec![f16::ZERO; 10];
        for (i, chunk) in ValuesMut::F16(&mut v).chunks(4).enumerate() {
            let ValuesMut::F16(chunk) = chunk else { unreachable!("the dtype stays") };
            chunk.fill(f16::from_f32(i as f32));
        }
        let v: Vec<f32> = v.into_iter().map(f32::from).collect();
        assert_eq!(v, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    fn the_first_nonfinite_value_is_named_and_all_are_counted() {
        let engine = Engine::new(crate::available()[0], 0);
        let v = [0.0, f32::NAN, 1.0, f32::NEG_INFINITY];
        let error = Values::F32(&v).nonfinite_error(engine);
        assert_eq!(error, CodecError::NonFinite { index: 1, count: 2 });

        let mut v = vec![bf16::ONE; 40 * JOB + 3]; // jobs of several threads
        for index in [5 * JOB + 7, 5 * JOB + 8, 17 * JOB, 40 * JOB + 2] {
            v[index] = bf16::NAN;
        }
        let error = Values::Bf16(&v).nonfinite_error(engine);
        assert_eq!(error, CodecError::NonFinite { index: 5 * JOB + 7, count: 4 });
    }
}
