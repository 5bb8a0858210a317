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
    #[cfg(target_arch = "x86_64")]
    found: u32,
}

#[cfg(not(target_arch = "x86_64"))]
impl Guard {
    fn enter() -> Self {
        Self {}
    }
}

#[cfg(target_arch = "x86_64")]
impl Guard {
    fn enter() -> Self {
        let found = mxcsr::read();
        if found & mxcsr::MODES != 0 {
            mxcsr::write(mxcsr::DEFAULT);
        }
        Self { found }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Guard {
    fn drop(&mut self) {
        if self.found & mxcsr::MODES != 0 {
            mxcsr::write(self.found);
        }
    }
}

/// The control register of SSE and AVX. Miri, which runs no inline assembly, has its default only.
#[cfg(target_arch = "x86_64")]
mod mxcsr {
    use std::arch::asm;

    /// All exceptions masked, round to nearest even, no flushing of subnormals.
    pub(super) const DEFAULT: u32 = 0x1f80;
    /// The bits that change results: flush to zero, rounding, denormals are zero.
    pub(super) const MODES: u32 = 0xe040;
    /// Flush to zero and denormals are zero.
    #[cfg(test)]
    pub(super) const FLUSH: u32 = 0x8040;

    pub(super) fn read() -> u32 {
        if cfg!(miri) {
            return DEFAULT;
        }
        let mut value = 0_u32;
        // SAFETY: stores the register to a local variable.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
        }
        value
    }

    pub(super) fn write(value: u32) {
        if cfg!(miri) {
            return;
        }
        // SAFETY: `value` is the default or was read from the register, so no reserved bit is set.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags));
        }
    }
}

/// Runs `work` as if another library had told the processor to flush subnormals to zero.
#[cfg(test)]
pub(crate) fn flushing_subnormals<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    mxcsr::write(mxcsr::DEFAULT | mxcsr::FLUSH);
    let result = apart(work);
    #[cfg(target_arch = "x86_64")]
    mxcsr::write(mxcsr::DEFAULT);
    result
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[inline(never)]
    fn tiny() -> f32 {
        black_box(black_box(1e-39_f32) * black_box(0.5))
    }

    #[test]
    #[cfg_attr(miri, ignore = "there is no control register")]
    fn subnormals_count_inside_and_the_old_mode_returns() {
        let [outside, inside, after] =
            flushing_subnormals(|| [tiny(), in_default_float_env(tiny), tiny()]);
        assert_eq!([outside, after], [0.0, 0.0]);
        assert_eq!(inside, 5e-40);
    }
}
