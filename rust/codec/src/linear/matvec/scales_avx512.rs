//! AVX-512: the scales of a row, 16 at a time, in the lanes that need them.

use std::arch::x86_64::*;

use crate::double_quant::NESTED_BLOCKSIZE;
use crate::linear::weight::Weight;
use crate::scales::Scales;
use crate::x86::avx512::{lanes, load_bytes, load_some, lookup, store};
use crate::x86::prefetch;

/// Most chunks that 16 scales reach for.
pub(crate) const MAX_CHUNKS: usize = 8;

/// The scales that a lane of chunk `i` needs, of 16: two a chunk, and four where blocks are of 32.
static PLACES: [[u32; 16]; MAX_CHUNKS] = places(8);
static PLACES_32: [[u32; 16]; MAX_CHUNKS] = places(4);

const fn places(lanes: u32) -> [[u32; 16]; MAX_CHUNKS] {
    let mut places = [[0; 16]; 8];
    let mut i = 0;
    while i < 128 {
        places[i / 16][i % 16] = i as u32 / lanes % 16;
        i += 1;
    }
    places
}

/// How the scales of a row are spread over chunks.
pub(crate) struct Places {
    /// Chunks that 16 scales reach for.
    pub(crate) chunks: usize,
    /// Of those, the scale that each lane of each chunk needs.
    pub(crate) lanes: &'static [[u32; 16]; MAX_CHUNKS],
    /// Blocks are of 64 values, shifted by this.
    shift: u32,
}

impl Places {
    #[inline(always)]
    pub(crate) fn new(weight: &Weight<'_>) -> Self {
        if weight.blocksize < 64 {
            Self { chunks: 4, lanes: &PLACES_32, shift: 0 }
        } else {
            Self { chunks: MAX_CHUNKS, lanes: &PLACES, shift: (weight.blocksize / 64).ilog2() }
        }
    }

    /// The scales of group `g` of chunks of a row, one a lane: each stands for 64 values, or 32 if
    /// blocks are of 32. Lanes beyond the row are zero. Wide ones of the next row are fetched.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(crate) fn scales(&self, weight: &Weight<'_>, row: usize, g: usize) -> __m512 {
        let a_row = weight.cols / weight.blocksize;
        let first = (16 * g) >> self.shift;
        let count = (a_row - first).min(16);
        if let Scales::Plain(scales) = weight.scales {
            prefetch(scales, 4 * ((row + 1) * a_row + first));
        }
        let scales = load_scales(&weight.scales, row * a_row + first, count);
        if self.shift == 0 {
            return scales;
        }
        let all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let from = _mm512_set1_epi32((16 * g - (first << self.shift)) as i32);
        let shift = _mm_cvtsi32_si128(self.shift as i32);
        _mm512_permutexvar_ps(_mm512_srl_epi32(_mm512_add_epi32(all, from), shift), scales)
    }
}

/// Writes the scales from that of block `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn write_scales(scales: &Scales<'_>, first: usize, out: &mut [f32]) {
    for (i, part) in out.chunks_mut(16).enumerate() {
        let found = load_scales(scales, first + 16 * i, part.len());
        if let Some(part) = part.first_chunk_mut::<16>() {
            store(part, _mm512_castps_si512(found));
        } else {
            part.copy_from_slice(&lanes(found)[..part.len()]);
        }
    }
}

/// Up to 16 scales from that of block `first` on; the lanes behind them are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn load_scales(scales: &Scales<'_>, first: usize, count: usize) -> __m512 {
    match *scales {
        Scales::Plain(scales) => load_some(&scales[first..first + count]),
        Scales::Nested { codes, table, nested, offset } => {
            let codes = load_bytes(&codes[first..first + count]);
            let values = lookup(table, _mm512_cvtepu8_epi32(codes));
            // The second-level scales of the first lane and the last: there are no others.
            let group = first / NESTED_BLOCKSIZE;
            let next = (group + 1) * NESTED_BLOCKSIZE - first;
            let behind = u16::MAX.checked_shl(next as u32).unwrap_or(0);
            let (near, far) = (nested[group], nested[(first + count - 1) / NESTED_BLOCKSIZE]);
            let nested = _mm512_mask_blend_ps(behind, _mm512_set1_ps(near), _mm512_set1_ps(far));
            let present = u16::MAX >> (16 - count);
            // Two roundings, as everywhere.
            _mm512_maskz_add_ps(present, _mm512_mul_ps(values, nested), _mm512_set1_ps(offset))
        }
    }
}
