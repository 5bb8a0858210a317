//! What the 32 bits of a lane hold, and the instruction that multiplies and adds them up.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::AddAssign;

use crate::linear::dense::terms::Pair;
use crate::plain::Plain;

/// Numbers that are multiplied lane by lane.
///
/// The instructions stand here as assembly: the compiler would fetch the values of all rows of a
/// tile first, which leaves no registers for the sums.
pub(crate) trait Lanes {
    /// 32 bits, handed out to all lanes.
    type Left: Plain;
    /// 32 bits, in vectors.
    type Right: Plain;
    /// What they add up to, 32 bits.
    type Sum: Plain + AddAssign;
    /// Nothing.
    const ZERO: Self::Sum;

    /// `sum += row * (lane k of x, in all lanes)`.
    ///
    /// # Safety
    /// The lane must be there, and the machine must have the instruction.
    unsafe fn add_lane(x: *const Self::Left, k: usize, row: __m512, sum: &mut __m512);

    /// The same for two vectors: the lane is fetched once.
    ///
    /// # Safety
    /// As above.
    unsafe fn add_lane_twice(
        x: *const Self::Left,
        k: usize,
        rows: [__m512; 2],
        sums: [&mut __m512; 2],
    );

    /// `sum += right * left`.
    ///
    /// # Safety
    /// The machine must have the instruction.
    unsafe fn add(right: __m512, left: __m512, sum: &mut __m512);

    /// The sum of sums.
    ///
    /// # Safety
    /// As above.
    unsafe fn join(a: __m512, b: __m512) -> __m512;
}

macro_rules! impl_lanes {
    ($name:ident, $left:ty, $right:ty, $sum:ty, $zero:expr, $op:literal, $join:literal) => {
        impl Lanes for $name {
            type Left = $left;
            type Right = $right;
            type Sum = $sum;
            const ZERO: $sum = $zero;

            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn add_lane(x: *const $left, k: usize, row: __m512, sum: &mut __m512) {
                // SAFETY: it reads the one lane, which the caller vouches for.
                unsafe {
                    asm!(
                        concat!($op, " {sum}, {row}, dword ptr [{x} + 4 * {k}]{{1to16}}"),
                        x = in(reg) x,
                        k = in(reg) k,
                        row = in(zmm_reg) row,
                        sum = inout(zmm_reg) *sum,
                        options(pure, readonly, nostack),
                    );
                }
            }

            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn add_lane_twice(
                x: *const $left,
                k: usize,
                rows: [__m512; 2],
                [sum0, sum1]: [&mut __m512; 2],
            ) {
                // Not `_`, for which a register of another kind may be named.
                let _lane: __m512;
                // SAFETY: as above.
                unsafe {
                    asm!(
                        "vbroadcastss {lane}, dword ptr [{x} + 4 * {k}]",
                        concat!($op, " {sum0}, {row0}, {lane}"),
                        concat!($op, " {sum1}, {row1}, {lane}"),
                        x = in(reg) x,
                        k = in(reg) k,
                        row0 = in(zmm_reg) rows[0],
                        row1 = in(zmm_reg) rows[1],
                        sum0 = inout(zmm_reg) *sum0,
                        sum1 = inout(zmm_reg) *sum1,
                        lane = out(zmm_reg) _lane,
                        options(pure, readonly, nostack),
                    );
                }
            }

            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn add(right: __m512, left: __m512, sum: &mut __m512) {
                // SAFETY: arithmetic on registers.
                unsafe {
                    asm!(
                        concat!($op, " {sum}, {right}, {left}"),
                        right = in(zmm_reg) right,
                        left = in(zmm_reg) left,
                        sum = inout(zmm_reg) *sum,
                        options(pure, nomem, nostack),
                    );
                }
            }

            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn join(a: __m512, b: __m512) -> __m512 {
                let sum;
                // SAFETY: as above.
                unsafe {
                    asm!(
                        concat!($join, " {sum}, {a}, {b}"),
                        a = in(zmm_reg) a,
                        b = in(zmm_reg) b,
                        sum = lateout(zmm_reg) sum,
                        options(pure, nomem, nostack),
                    );
                }
                sum
            }
        }
    };
}

/// One fp32 number, products fused with sums.
pub(crate) struct Floats;
impl_lanes!(Floats, f32, f32, f32, 0.0, "vfmadd231ps", "vaddps");

/// Two bfloat16 numbers, sums in fp32; subnormal numbers count as zero.
pub(crate) struct Pairs;
impl_lanes!(Pairs, Pair, Pair, f32, 0.0, "vdpbf16ps", "vaddps");

/// Four bytes, with signs on the left and without on the right; sums are integers.
pub(crate) struct Fours;
impl_lanes!(Fours, [i8; 4], [u8; 4], i32, 0, "vpdpbusd", "vpaddd");
