//! The tile registers of AMX: eight matrices of 16 rows of 64 bytes.
//!
//! The intrinsics are not stable in Rust yet, so the instructions stand here as assembly. The
//! compiler knows nothing of the registers: what is in them lives from one block of assembly to
//! the next, on one thread, between [`Tiles::configure`] and the end of its value.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

use half::bf16;

use crate::scratch::Line;

/// Lines of a tile in memory: its rows, without gaps.
pub(crate) const LINES: usize = 16;
/// Columns of a right-hand tile.
pub(crate) const TOKENS: usize = 16;
/// Bytes from one row of a tile in memory to the next.
const STRIDE: usize = size_of::<Line>();

/// Whether this processor has tiles of bfloat16 and the system lends them to this process.
pub(crate) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| !cfg!(miri) && has_amx_bf16() && request())
}

fn has_amx_bf16() -> bool {
    use std::arch::is_x86_feature_detected as has;
    if !has!("avx512bf16") {
        return false;
    }
    // amx-bf16, amx-tile and amx-int8: bits 22, 24 and 25 of EDX in leaf 7.
    let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
    [22, 24, 25].into_iter().all(|bit| edx >> bit & 1 == 1)
}

/// Asks Linux for the tiles' 8 KiB of state, for all threads of the process.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call changes a permission and nothing else; it fails where the kernel is too old
    // or a signal stack of the process is too small for the state.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Tiles whose rows are `step` lines apart, one tile's rows after the other's.
///
/// The lines between belong to other tiles: what is decoded from a row of codes is written in one
/// run.
#[derive(Clone, Copy)]
pub(crate) struct Stack<'a> {
    lines: &'a [Line],
    step: usize,
}

impl<'a> Stack<'a> {
    /// The tiles whose first row is the first of the lines.
    #[inline(always)]
    pub(crate) fn new(lines: &'a [Line], step: usize) -> Self {
        Self { lines, step }
    }

    /// Tiles without other lines between.
    #[inline(always)]
    pub(crate) fn dense(lines: &'a [Line]) -> Self {
        Self::new(lines, 1)
    }

    /// Where each of the first `N` tiles starts.
    #[inline(always)]
    fn tiles<const N: usize>(self) -> [*const Line; N] {
        assert!((N * LINES - 1) * self.step < self.lines.len(), "the stack has fewer tiles");
        core::array::from_fn(|i| self.lines.as_ptr().wrapping_add(i * LINES * self.step))
    }

    /// Bytes from row to row.
    #[inline(always)]
    fn stride(self) -> usize {
        self.step * STRIDE
    }
}

/// Proof that the tile registers of this thread are configured: eight of 16 rows of 64 bytes.
pub(crate) struct Tiles(PhantomData<*const ()>);

/// The layout that `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

#[allow(clippy::unused_self)] // the value is the proof that the registers are configured
impl Tiles {
    /// Configures the registers; they are released when the value is dropped.
    ///
    /// # Safety
    /// [`granted`] has returned true.
    pub(crate) unsafe fn configure() -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        config.bytes_per_row[..8].fill(STRIDE as u16);
        config.rows[..8].fill(16);
        // SAFETY: the process may use the tiles, and the configuration is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(PhantomData)
    }

    /// Sets the four accumulators, tiles 0 to 3, to zero.
    #[inline(always)]
    pub(crate) fn zero(&self) {
        // SAFETY: the registers are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem),
            );
        }
    }

    /// Reads the four accumulators.
    #[inline(always)]
    pub(crate) fn load(&self, from: &[Line; 4 * LINES]) {
        // SAFETY: the registers are configured; four tiles are read, which is what `from` holds.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 1024]",
                "tileloadd tmm2, [{c} + {s} + 2048]", "tileloadd tmm3, [{c} + {s} + 3072]",
                c = in(reg) from.as_ptr(), s = in(reg) STRIDE, options(nostack, readonly),
            );
        }
    }

    /// Writes the four accumulators.
    #[inline(always)]
    pub(crate) fn store(&self, to: &mut [Line; 4 * LINES]) {
        // SAFETY: the registers are configured; four tiles are written, which `to` has room for.
        unsafe {
            asm!(
                "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 1024], tmm1",
                "tilestored [{c} + {s} + 2048], tmm2", "tilestored [{c} + {s} + 3072], tmm3",
                c = in(reg) to.as_mut_ptr(), s = in(reg) STRIDE, options(nostack),
            );
        }
    }
}

/// Two functions that multiply with the instruction `$dot`.
macro_rules! impl_multiply {
    ($dot:literal, $four:ident, $two:ident, $values:literal) => {
        #[allow(clippy::unused_self)] // see above
        impl Tiles {
            /// Adds the products of four tiles in `a` with one in `b`.
            ///
            /// Accumulator `i` gets `a[i] b`:
            #[doc = $values]
            #[inline(always)]
            pub(crate) fn $four(&self, a: Stack<'_>, b: Stack<'_>) {
                let ([a0, a1, a2, a3], [b0]) = (a.tiles(), b.tiles());
                // SAFETY: the registers are configured; the stacks have the tiles that are read.
                unsafe {
                    asm!(
                        "tileloadd tmm6, [{b0} + {t}]",
                        "tileloadd tmm4, [{a0} + {s}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm5, [{a1} + {s}]",
                        concat!($dot, " tmm1, tmm5, tmm6"),
                        "tileloadd tmm4, [{a2} + {s}]",
                        concat!($dot, " tmm2, tmm4, tmm6"),
                        "tileloadd tmm5, [{a3} + {s}]",
                        concat!($dot, " tmm3, tmm5, tmm6"),
                        a0 = in(reg) a0, a1 = in(reg) a1, a2 = in(reg) a2, a3 = in(reg) a3,
                        b0 = in(reg) b0, s = in(reg) a.stride(), t = in(reg) b.stride(),
                        options(nostack, readonly),
                    );
                }
            }

            /// Adds the products of two tiles in `a` with one in each `b`.
            ///
            /// Accumulators 0 to 3 get `a[0] b[0]`, `a[0] b[1]`, `a[1] b[0]` and `a[1] b[1]`:
            #[doc = $values]
            #[inline(always)]
            pub(crate) fn $two(&self, a: Stack<'_>, b: [Stack<'_>; 2]) {
                let ([a0, a1], [[b0], [b1]]) = (a.tiles(), b.map(Stack::tiles));
                // SAFETY: the registers are configured; the stacks have the tiles that are read.
                unsafe {
                    asm!(
                        "tileloadd tmm4, [{a0} + {s}]",
                        "tileloadd tmm6, [{b0} + {t}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{b1} + {u}]",
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        "tileloadd tmm5, [{a1} + {s}]",
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        concat!($dot, " tmm3, tmm5, tmm7"),
                        a0 = in(reg) a0, a1 = in(reg) a1, b0 = in(reg) b0, b1 = in(reg) b1,
                        s = in(reg) a.stride(), t = in(reg) b[0].stride(),
                        u = in(reg) b[1].stride(), options(nostack, readonly),
                    );
                }
            }
        }
    };
}
#[allow(clippy::unused_self)] // see above
impl Tiles {
    /// Adds the products of 32 rows of 32 bfloat16, `stride` values apart, with two tiles.
    ///
    /// Accumulators 0 to 3 get the first 16 rows times `b0`, times `b1`, then the others.
    #[inline(always)]
    pub(crate) fn multiply_rows(
        &self,
        a: &[bf16],
        stride: usize,
        b0: &[Line; LINES],
        b1: &[Line; LINES],
    ) {
        assert!(31 * stride + 32 <= a.len());
        let second = a[16 * stride..].as_ptr();
        // SAFETY: the registers are configured; 32 rows and two tiles are read, which is what the
        // slice, as was checked, and the arrays hold.
        unsafe {
            asm!(
                "tileloadd tmm4, [{a0} + {stride}]",
                "tileloadd tmm6, [{b0} + {s}]", "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {s}]", "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {stride}]", "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) a.as_ptr(), a1 = in(reg) second, stride = in(reg) 2 * stride,
                b0 = in(reg) b0.as_ptr(), b1 = in(reg) b1.as_ptr(), s = in(reg) STRIDE,
                options(nostack, readonly),
            );
        }
    }
}

impl_multiply!(
    "tdpbf16ps",
    multiply_4x1,
    multiply_2x2,
    "16 rows of 32 bfloat16 by 16 rows of 16 pairs, sums in fp32."
);
impl_multiply!(
    "tdpbssd",
    multiply_int8_4x1,
    multiply_int8_2x2,
    "16 rows of 64 bytes with signs by 16 rows of 16 fours, sums in 32-bit integers."
);

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the registers are configured; afterwards nothing uses them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(value: impl Fn(usize, usize) -> f32) -> [Line; 16] {
        core::array::from_fn(|row| {
            let mut line = Line([0; 64]);
            for (i, bytes) in line.0.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *bytes = bf16::from_f32(value(row, i)).to_le_bytes();
            }
            line
        })
    }

    #[test]
    fn products_land_in_their_accumulators() {
        if !granted() {
            return; // no such machine: nothing to check
        }
        let a = |t: usize| move |row: usize, k: usize| (t + row) as f32 + 0.5 * (k % 3) as f32;
        let b = |t: usize| move |k: usize, m: usize| (k * 2 % 5) as f32 - (m + t) as f32;
        // Row p of a right tile holds pairs (k = 2 p, 2 p + 1) of each column.
        let right = |t: usize| tile(move |p, i| b(t)(2 * p + i % 2, i / 2));
        let expected = |ta: usize, tb: usize, row: usize, m: usize| -> f32 {
            (0..32).map(|k| a(ta)(row, k) * b(tb)(k, m)).sum()
        };
        let float = |lines: &[Line], row: usize, m: usize| {
            f32::from_le_bytes(lines[row].0.as_chunks::<4>().0[m])
        };
        let left: Vec<Line> = (0..4).flat_map(|t| tile(a(t))).collect();
        let apart: Vec<Line> =
            left.iter().flat_map(|line| [*line, Line([0xff; 64]), Line([0xff; 64])]).collect();
        let mut sums = [Line([0; 64]); 64];
        // SAFETY: granted.
        let tiles = unsafe { Tiles::configure() };

        tiles.zero();
        tiles.multiply_4x1(Stack::new(&apart, 3), Stack::dense(&right(0)));
        tiles.store(&mut sums);
        for (t, sums) in sums.chunks(16).enumerate() {
            for (row, m) in (0..16).flat_map(|row| (0..16).map(move |m| (row, m))) {
                assert_eq!(float(sums, row, m), expected(t, 0, row, m));
            }
        }
        tiles.load(&sums); // goes on from there
        tiles.multiply_2x2(Stack::dense(&left), [&right(0), &right(1)].map(|b| Stack::dense(b)));
        let first = sums;
        tiles.store(&mut sums);
        for (t, (sums, first)) in sums.chunks(16).zip(first.chunks(16)).enumerate() {
            for (row, m) in (0..16).flat_map(|row| (0..16).map(move |m| (row, m))) {
                let added = expected(t / 2, t % 2, row, m);
                assert_eq!(float(sums, row, m), float(first, row, m) + added);
            }
        }
    }
}
