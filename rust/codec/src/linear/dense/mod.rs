//! Products of dense fp32 matrices, added to what is there: the inner loops of every path that
//! has no instructions of its own for the codes.
//!
//! ```text
//! nt    sums[i][j] += sum over k of x[i][k] * w[j][k]        x (m, k), w (n, k)
//! nn    sums[i][j] += sum over k of x[i][k] * w[k][j]        x (m, k), w (k, n)
//! ```
//!
//! All matrices are row-major without gaps; sums is (m, n). Products may be fused with sums, and
//! each body sums in its own fixed order: they agree to rounding.

pub(crate) mod scalar;
