//! Which instruction sets this machine has, for diagnosis.

/// Names and presence of the instruction sets that qkern has, or may get, a body for.
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    let (x86, neon) = (x86(), false);
    #[cfg(target_arch = "aarch64")]
    let (x86, neon) = (X86.map(|_| false), std::arch::is_aarch64_feature_detected!("neon"));
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let (x86, neon) = (X86.map(|_| false), false);

    X86.into_iter().zip(x86).chain([("neon", neon)]).collect()
}

const X86: [&str; 14] = [
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512vbmi",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
];

/// The presence of each of [`X86`].
#[cfg(target_arch = "x86_64")]
fn x86() -> [bool; 14] {
    use std::arch::is_x86_feature_detected as has;

    // Detection of AMX is not stable in std: leaf 7 of CPUID, EDX. Whether the system lends the
    // tiles to a process is another question, which costs a system call.
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    let amx = |bit: u32| leaf.edx >> bit & 1 == 1;
    [
        has!("avx2"),
        has!("fma"),
        has!("f16c"),
        has!("avx512f"),
        has!("avx512bw"),
        has!("avx512vl"),
        has!("avx512dq"),
        has!("avx512vbmi"),
        has!("avx512vnni"),
        has!("avx512bf16"),
        has!("avx512fp16"),
        amx(24),
        amx(22),
        amx(25),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_named_once() {
        let mut names: Vec<_> = cpu_features().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 15);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 15);
    }
}
