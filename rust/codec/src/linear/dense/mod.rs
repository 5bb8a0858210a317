//! Products of dense matrices in fp32, or in pairs of bfloat16, added to what is there: the inner loops of every path that
//! has no instructions of its own for the codes.
//!
//! ```text
//! nt    sums[i][j] += sum over k of x[i][k] * w[j][k]        x (m, k), w (n, k)
//! nn    sums[i][j] += sum over k of x[i][k] * w[k][j]        x (m, k), w (k, n)
//! ```
//!
//! All matrices are row-major without gaps; sums is (m, n). Products may be fused with sums, and
//! each body sums in its own fixed order: they agree to rounding.
//!
//! `nn` also takes a slice that is needed next, and fetches it into the second-level cache meanwhile.
//!
//! `nt` is for few rows of x: a tile of dot products along k, both matrices as they lie. `nn` is
//! for many: a tile of sums stays in registers, a row of w meets one value of each row of x.
//! [`tokens`] lays out x so that a product with many rows of W is an `nn`.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod convert_avx2;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod convert_avx512;
pub(crate) mod forward;
pub(crate) mod scalar;
pub(crate) mod terms;
#[cfg(test)]
mod tests;
pub(crate) mod tokens;
