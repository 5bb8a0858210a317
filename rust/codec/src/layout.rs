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
    use crate::parallel::JOB;

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
    fn sizes_are_right_beyond_32_bits() {
        let edges = [31, 32, 33].map(|bits| 1_usize << bits);
        for len in edges.into_iter().flat_map(|edge| [edge - 1, edge, edge + 1, edge + 65_537]) {
            assert_eq!(packed_len(len) as u128, (len as u128).div_ceil(2));
            for blocksize in [32, 64, 4096] {
                let blocks = (len as u128).div_ceil(blocksize as u128);
                assert_eq!(num_blocks(len, blocksize) as u128, blocks, "{len} by {blocksize}");
            }
        }
        let len = (1 << 32) + 1;
        let error = check_len("packed", 1, packed_len(len), (len, "values")).unwrap_err();
        let text = "packed has length 1, but 4294967297 values need 2147483649";
        assert_eq!(error.to_string(), text, "no number is cut to 32 bits");
    }

    /// Slices of nothing: any length without memory.
    #[test]
    fn every_job_has_its_bytes_and_scales_beyond_32_bits() {
        let unit = |len: usize| vec![(); len];
        for len in [(1 << 31) + 65_536 + 64, (1_usize << 32) + 96, (1 << 33) - 32] {
            for blocksize in [32, 4096] {
                let whole = len / blocksize * blocksize;
                let (values, packed) = (unit(whole), unit(packed_len(whole)));
                let absmax = unit(num_blocks(whole, blocksize));
                let outputs = packed.chunks(JOB / 2).zip(absmax.chunks(JOB / blocksize));
                let mut total = 0_usize;
                for (values, (packed, absmax)) in values.chunks(JOB).zip(outputs) {
                    assert_eq!((values.len() / 2, values.len() % 2), (packed.len(), 0));
                    assert_eq!(values.len() / blocksize, absmax.len());
                    total += values.len();
                }
                assert_eq!(total, whole, "{len} by {blocksize}");
            }
        }
    }

    #[test]
    fn only_powers_of_two_in_range_are_block_sizes() {
        let accepted: Vec<usize> = (0..10_000).filter(|&b| check_blocksize(b).is_ok()).collect();
        assert_eq!(accepted, [32, 64, 128, 256, 512, 1024, 2048, 4096]);
        assert_eq!(check_blocksize(1 << 63), Err(CodecError::Blocksize(1 << 63)));
    }
}
