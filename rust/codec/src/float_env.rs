//! The float environment that the bodies assume: round to nearest, subnormals kept.
//!
//! Other libraries change it (`torch.set_flush_denormal(True)`, code built with fast math), and a
//! new thread inherits its maker's; results must not depend on that.
#![allow(unsafe_code)]

/// Runs `work` in the default float environment of the calling thread.
pub(crate) fn in_default_float_env<R>(work: impl FnOnce() -> R) -> R {
    let _guard = Guard::enter();
    apart(work)
}

/// Keeps the arithmetic of `work` where the call is: the compiler may move it past a write of the
/// control register, but not a call that writes memory.
#[inline(never)]
fn apart<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// Puts the environment back that it found.
struct Guard {
    found: control::Register,
}

impl Guard {
    fn enter() -> Self {
        let found = control::read();
        if found & control::MODES != 0 {
            control::write(control::DEFAULT);
        }
        Self { found }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.found & control::MODES != 0 {
            control::write(self.found);
        }
    }
}

/// MXCSR, the control register of SSE and AVX.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod control {
    use std::arch::asm;

    pub(super) type Register = u32;

    /// All exceptions masked, round to nearest even, no flushing of subnormals.
    pub(super) const DEFAULT: Register = 0x1f80;
    /// The bits that change results: flush to zero, rounding, denormals are zero.
    pub(super) const MODES: Register = 0xe040;
    /// Flush to zero and denormals are zero.
    #[cfg(test)]
    pub(super) const FLUSH: Register = 0x8040;

    pub(super) fn read() -> Register {
        let mut value = 0_u32;
        // SAFETY: stores the register to a local variable.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
        }
        value
    }

    pub(super) fn write(value: Register) {
        // SAFETY: `value` is the default or was read from the register, so no reserved bit is set.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags));
        }
    }
}

/// FPCR, the control register of scalar floats and NEON.
#[cfg(all(target_arch = "aarch64", not(miri)))]
mod control {
    use std::arch::asm;

    pub(super) type Register = u64;

    /// No traps, round to nearest even, no flushing of subnormals, NaN keeps its payload.
    pub(super) const DEFAULT: Register = 0;
    /// The bits that change results: flush inputs, the alternate behaviour of NaN and of other
    /// elements (0 to 2), flush half precision (19), rounding (22 and 23), flush to zero (24), one
    /// NaN for all (25), half precision without infinity (26).
    pub(super) const MODES: Register = 0x07c8_0007;
    /// Flush to zero: inputs and results.
    #[cfg(test)]
    pub(super) const FLUSH: Register = 1 << 24;

    pub(super) fn read() -> Register {
        let value;
        // SAFETY: copies the register.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nostack, preserves_flags)) }
        value
    }

    pub(super) fn write(value: Register) {
        // SAFETY: `value` is the default or was read from the register, so no reserved bit is set.
        unsafe { asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags)) }
    }
}

/// No register to change: other processors, and Miri, which runs no inline assembly.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod control {
    pub(super) type Register = u32;

    pub(super) const DEFAULT: Register = 0;
    pub(super) const MODES: Register = 1;
    #[cfg(test)]
    pub(super) const FLUSH: Register = 1;

    pub(super) fn read() -> Register {
        DEFAULT
    }

    pub(super) fn write(_: Register) {}
}

/// Runs `work` as if another library had told the processor to flush subnormals to zero.
#[cfg(test)]
pub(crate) fn flushing_subnormals<R>(work: impl FnOnce() -> R) -> R {
    control::write(control::DEFAULT | control::FLUSH);
    let result = apart(work);
    control::write(control::DEFAULT);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[inline(never)]
    fn tiny() -> f32 {
        black_box(black_box(1e-39_f32) * black_box(0.5))
    }

    #[test]
    #[cfg_attr(
        any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))),
        ignore = "there is no control register"
    )]
    fn subnormals_count_inside_and_the_old_mode_returns() {
        let [outside, inside, after] =
            flushing_subnormals(|| [tiny(), in_default_float_env(tiny), tiny()]);
        assert_eq!([outside, after], [0.0, 0.0]);
        assert_eq!(inside, 5e-40);
    }

    #[test]
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    fn half_precision_has_its_infinity_inside() {
        use half::f16;

        let infinity = || black_box(f16::INFINITY).to_f32();
        control::write(1 << 26);
        let inside = in_default_float_env(infinity);
        control::write(control::DEFAULT);
        assert_eq!(inside, f32::INFINITY);
    }
}
