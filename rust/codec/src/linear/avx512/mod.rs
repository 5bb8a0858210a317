//! What tiles and vectors of AVX-512 share: codes of 4 bits to tiles and to bytes.

pub(crate) mod bytes;
pub(crate) mod decode;
pub(crate) mod nibbles;
