//! The float environment that the bodies assume: round to nearest, subnormals kept.
//!
//! Other libraries change it (`torch.set_flush_denormal(True)`, compilers with fast math), and a
//! new thread inherits its maker's; results must not depend on that.
#![allow(unsafe_code)]

/// Holds the calling thread in the default float environment; dropping it puts the old one back.
pub(crate) struct DefaultFloatEnv {
    #[cfg(target_arch = "x86_64")]
    found: u32,
}

#[cfg(target_arch = "x86_64")]
impl DefaultFloatEnv {
    /// All exceptions masked, round to nearest even, no flushing of subnormals.
    const DEFAULT: u32 = 0x1f80;
    /// The bits that change results: rounding, flush to zero, denormals are zero.
    const MODES: u32 = 0xe040;

    pub(crate) fn enter() -> Self {
        let mut found = 0_u32;
        // SAFETY: stores the control register to a local, no other effect.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut found, options(nostack, preserves_flags));
        }
        if found & Self::MODES != 0 {
            write_mxcsr(Self::DEFAULT);
        }
        Self { found }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for DefaultFloatEnv {
    fn drop(&mut self) {
        if self.found & Self::MODES != 0 {
            write_mxcsr(self.found);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn write_mxcsr(value: u32) {
    // SAFETY: the value is the default or was read from the register, so no reserved bit is set.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags));
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl DefaultFloatEnv {
    pub(crate) fn enter() -> Self {
        Self {}
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[test]
    fn subnormals_count_inside_and_the_old_mode_returns() {
        const FLUSH: u32 = DefaultFloatEnv::DEFAULT | 0x8040;
        let tiny = || black_box(1e-39_f32) * black_box(0.5);
        write_mxcsr(FLUSH);
        let outside = tiny();
        let inside = {
            let _env = DefaultFloatEnv::enter();
            tiny()
        };
        let after = tiny();
        write_mxcsr(DefaultFloatEnv::DEFAULT);
        assert_eq!((outside, after), (0.0, 0.0));
        assert_eq!(inside, 5e-40);
    }
}
