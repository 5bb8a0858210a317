//! Memory that a thread uses again: fresh pages would cost more than the work done in them.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Bytes of each type that a thread keeps for its next call, at most.
const KEPT: usize = 8 << 20;

/// What a thread keeps rooms of.
pub(crate) trait Kept: Copy + 'static {
    /// What new memory is filled with.
    const FILL: Self;
    /// Takes the rooms of this thread that nobody uses.
    fn take() -> Vec<Vec<Self>>;
    /// Puts them back.
    fn put(rooms: Vec<Vec<Self>>);
}

macro_rules! impl_kept {
    ($type:ty, $fill:expr, $idle:ident) => {
        thread_local! {
            static $idle: Cell<Vec<Vec<$type>>> = const { Cell::new(Vec::new()) };
        }
        impl Kept for $type {
            const FILL: Self = $fill;
            fn take() -> Vec<Vec<Self>> {
                $idle.try_with(Cell::take).unwrap_or_default()
            }
            fn put(rooms: Vec<Vec<Self>>) {
                // At the end of a thread there is no next call.
                let _ = $idle.try_with(|idle| idle.set(rooms));
            }
        }
    };
}
impl_kept!(Line, Line([0; 64]), IDLE_LINES);
impl_kept!(f32, 0.0, IDLE_FLOATS);

/// Room for values, which are unspecified at first; dropped, the thread keeps its memory.
pub(crate) struct Scratch<T: Kept> {
    room: Vec<T>,
    len: usize,
}

impl<T: Kept> Scratch<T> {
    pub(crate) fn new(len: usize) -> Self {
        let mut idle = T::take();
        // The smallest that fits, or else the largest, which grows.
        let fit =
            |room: &Vec<T>| if room.len() >= len { room.len() } else { usize::MAX - room.len() };
        let best = (0..idle.len()).min_by_key(|&i| fit(&idle[i]));
        let mut room = best.map(|i| idle.swap_remove(i)).unwrap_or_default();
        T::put(idle);
        if room.len() < len {
            room.resize(len, T::FILL);
        }
        Self { room, len }
    }
}

impl<T: Kept> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.room[..self.len]
    }
}

impl<T: Kept> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.room[..self.len]
    }
}

impl<T: Kept> Drop for Scratch<T> {
    fn drop(&mut self) {
        let mut idle = T::take();
        let kept: usize = idle.iter().map(Vec::len).sum();
        if (kept + self.room.len()) * size_of::<T>() <= KEPT {
            idle.push(std::mem::take(&mut self.room));
        }
        T::put(idle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_are_used_again_and_never_by_two() {
        let address = |room: &Scratch<f32>| room.as_ptr();
        let (mut a, b) = (Scratch::<f32>::new(1000), Scratch::<f32>::new(10));
        assert_eq!((a.len(), b.len()), (1000, 10));
        assert_ne!(address(&a), address(&b));
        a.fill(1.0);
        let (old_a, old_b) = (address(&a), address(&b));
        drop((a, b));
        let (small, large) = (Scratch::<f32>::new(9), Scratch::<f32>::new(999));
        assert_eq!((address(&small), address(&large)), (old_b, old_a));
    }

    #[test]
    fn a_thread_keeps_no_more_than_its_share() {
        let rooms: Vec<_> = (0..4).map(|_| Scratch::<Line>::new(KEPT / 64 / 2)).collect();
        drop(rooms);
        assert_eq!(Line::take().len(), 2);
    }
}
