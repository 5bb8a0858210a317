//! Memory that a thread uses again: fresh pages would cost more than the work done in them.

#![allow(unsafe_code)] // lines of memory, seen as the values that they hold

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use crate::plain::Plain;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

// SAFETY: 64 bytes.
unsafe impl Plain for Line {}

/// Bytes that a thread keeps for its next call, at most.
const KEPT: usize = 16 << 20;

thread_local! {
    /// The rooms of this thread that nobody uses.
    static IDLE: Cell<Vec<Vec<Line>>> = const { Cell::new(Vec::new()) };
}

fn take() -> Vec<Vec<Line>> {
    IDLE.try_with(Cell::take).unwrap_or_default()
}

fn put(rooms: Vec<Vec<Line>>) {
    // At the end of a thread there is no next call.
    let _ = IDLE.try_with(|idle| idle.set(rooms));
}

/// Room for values, at the start of a cache line; they are unspecified at first. Dropped, the
/// thread keeps its memory.
pub(crate) struct Scratch<T: Plain> {
    room: Vec<Line>,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Plain> Scratch<T> {
    /// Values of a line.
    const PER_LINE: usize = {
        assert!(size_of::<Line>().is_multiple_of(size_of::<T>()));
        assert!(align_of::<T>() <= align_of::<Line>());
        size_of::<Line>() / size_of::<T>()
    };

    pub(crate) fn new(len: usize) -> Self {
        let lines = len.div_ceil(Self::PER_LINE);
        let mut idle = take();
        // The smallest that fits, or else the largest, which grows.
        let fit = |room: &Vec<Line>| {
            if room.len() >= lines {
                room.len()
            } else {
                usize::MAX - room.len()
            }
        };
        let best = (0..idle.len()).min_by_key(|&i| fit(&idle[i]));
        let mut room = best.map(|i| idle.swap_remove(i)).unwrap_or_default();
        put(idle);
        if room.len() < lines {
            // Gone before there is another, which is no larger than what is asked for.
            drop(room);
            room = vec![Line([0; 64]); lines];
        }
        if cfg!(test) {
            room.fill(Line([0xff; 64])); // NaN: what is read must have been written
        }
        Self { room, len, holds: PhantomData }
    }
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `new` made so many values fit, whose bytes are set, and any are values.
        unsafe { std::slice::from_raw_parts(self.room.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; and whatever is written has all its bytes set, as T has no gaps.
        unsafe { std::slice::from_raw_parts_mut(self.room.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Plain> Drop for Scratch<T> {
    fn drop(&mut self) {
        let mut idle = take();
        let kept: usize = idle.iter().map(Vec::len).sum();
        if (kept + self.room.len()) * size_of::<Line>() <= KEPT {
            idle.push(std::mem::take(&mut self.room));
        }
        put(idle);
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
    fn a_room_that_grows_is_no_larger_than_what_is_asked_for() {
        drop(Scratch::<f32>::new(16 * 1000));
        let room = Scratch::<f32>::new(16 * 1001);
        assert_eq!((room.len(), room.room.capacity()), (16 * 1001, 1001));
    }

    #[test]
    fn a_thread_keeps_no_more_than_its_share() {
        let rooms: Vec<_> = (0..4).map(|_| Scratch::<Line>::new(KEPT / 64 / 2)).collect();
        drop(rooms);
        assert_eq!(take().len(), 2);
    }
}
