//! Weights whose codes go straight into tiles.

use std::ops::Range;

use crate::linear::avx512::decode::CHUNK;
use crate::linear::matvec::scales_avx512::write_scales;
use crate::linear::weight::{Codes, Weight};
use crate::scratch::Scratch;

/// A weight of 4-bit codes whose chunks have one scale in each half.
pub(crate) struct Nibbles<'a> {
    pub(crate) weight: &'a Weight<'a>,
    pub(crate) packed: &'a [u8],
    pub(crate) table: &'a [f32; 16],
}

impl<'a> Nibbles<'a> {
    pub(crate) fn of(weight: &'a Weight<'a>) -> Option<Self> {
        match weight.codes {
            Codes::FourBit { packed, table } if weight.chunks_have_scales() => {
                Some(Self { weight, packed, table })
            }
            _ => None,
        }
    }

    /// Two scales a chunk for each row: those of its halves, zero after the last column.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn scales(&self, rows: Range<usize>, chunks: usize) -> Scratch<f32> {
        let Weight { scales, blocksize, cols, .. } = *self.weight;
        let blocks = cols / blocksize;
        let halves = blocksize / (CHUNK / 2);
        let mut room = Scratch::<f32>::new(rows.len() * 2 * chunks);
        for (row, room) in rows.zip(room.chunks_exact_mut(2 * chunks)) {
            let (used, rest) = room.split_at_mut(blocks * halves);
            write_scales(&scales, row * blocks, &mut used[..blocks]);
            for half in (0..used.len()).rev().filter(|_| halves > 1) {
                used[half] = used[half / halves];
            }
            rest.fill(0.0);
        }
        room
    }
}
