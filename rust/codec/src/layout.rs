//! How many blocks and bytes a tensor takes, and the length checks that every operation shares.

use crate::error::CodecError;

/// Smallest block of values that share a scale.
pub const MIN_BLOCKSIZE: usize = 32;
/// Largest block of values that share a scale.
pub const MAX_BLOCKSIZE: usize = 4096;

/// Blocks, and so scales, of `len` values.
pub fn num_blocks(len: usize, blocksize: usize) -> usize {
    len.div_ceil(blocksize)
}

/// Bytes of `len` 4-bit codes.
pub fn packed_len(len: usize) -> usize {
    len.div_ceil(2)
}

/// Refuses a block size that is not a power of two in the allowed range.
pub(crate) fn check_blocksize(blocksize: usize) -> Result<(), CodecError> {
    let allowed = (MIN_BLOCKSIZE..=MAX_BLOCKSIZE).contains(&blocksize);
    if allowed && blocksize.is_power_of_two() {
        Ok(())
    } else {
        Err(CodecError::Blocksize(blocksize))
    }
}

/// Refuses rows without values.
pub(crate) fn check_row(row: usize) -> Result<(), CodecError> {
    if row == 0 {
        return Err(CodecError::Row);
    }
    Ok(())
}

/// Refuses a slice called `what` whose length is not what `count` `unit` need.
pub(crate) fn check_len(
    what: &'static str,
    found: usize,
    expected: usize,
    (count, unit): (usize, &'static str),
) -> Result<(), CodecError> {
    if found == expected {
        Ok(())
    } else {
        Err(CodecError::Length { what, found, expected, unit, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_up() {
        assert_eq!((num_blocks(0, 64), num_blocks(64, 64), num_blocks(65, 64)), (0, 1, 2));
        assert_eq!((packed_len(0), packed_len(1), packed_len(2)), (0, 1, 1));
    }

    #[test]
    fn sizes_are_right_at_the_end_of_the_address_space() {
        assert_eq!(num_blocks(usize::MAX, 64), usize::MAX / 64 + 1);
        assert_eq!(packed_len(usize::MAX), usize::MAX / 2 + 1);
    }

    #[test]
    fn only_powers_of_two_in_range_are_block_sizes() {
        let accepted: Vec<usize> = (0..10_000).filter(|&b| check_blocksize(b).is_ok()).collect();
        assert_eq!(accepted, [32, 64, 128, 256, 512, 1024, 2048, 4096]);
        assert_eq!(check_blocksize(1 << 63), Err(CodecError::Blocksize(1 << 63)));
    }
}
