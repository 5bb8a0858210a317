"""What is known of a weight once it is measured: values, scales and codes, error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class ValueStatistics:
    """How a tensor's finite values are distributed.

    Args:
        nonfinite: values that are NaN or infinite; the rest of the fields leave them out.
        first_nonfinite: flat index of the first of them, None if there is none.
        rms: root mean square.
        max_abs: largest magnitude.
        kurtosis: fourth standardized moment, ``E[(x - mean)^4] / var^2``: 3 for a normal
            distribution, more with heavier tails; None if all values are equal.
        crest_factor: ``max_abs / rms``, the peak-to-RMS ratio; None if all values are 0.
        outliers: values with ``|x| > outlier_rms * rms``.
    """

    nonfinite: int
    first_nonfinite: int | None
    rms: float
    max_abs: float
    kurtosis: float | None
    crest_factor: float | None
    outliers: int


@dataclasses.dataclass(frozen=True)
class ScaleStatistics:
    """The scales of a quantized tensor, as they decode.

    Args:
        blocks: scales.
        min_abs: smallest magnitude that is not 0; None if there is none, as for the next two.
        max_abs: largest finite magnitude.
        zero: scales that are 0.
        negative: scales below 0: chosen so by the method "search", never a block's maximum.
        turned: negative ones that double quantization may have made of positive ones: it is off by
            up to 1/128 of a group's ``nested_absmax``. Without an offset it keeps all signs, and
            takes none where signs were chosen.
        nonfinite: scales that are NaN or infinite.
        group_ratio: largest ratio of two magnitudes, not 0, within a group of 256: double
            quantization spends its 8 bits on the largest of a group. None too for a format that
            never has it.
        code_counts: how often each of the 16 codes occurs, in the order of the format's table; of
            int8 each of the 256 from -128.
        code_entropy: Shannon entropy of the codes in bits, of at most 4 or 8.
    """

    blocks: int
    min_abs: float | None
    max_abs: float | None
    zero: int
    negative: int
    turned: int
    nonfinite: int
    group_ratio: float | None
    code_counts: tuple[int, ...]
    code_entropy: float


@dataclasses.dataclass(frozen=True)
class BlockError:
    """The error of one block.

    Args:
        relative_rms: ``||error|| / ||reference||`` over the block; infinite where the reference
            is all zeros and the error is not.
        block: index over the flat row-major tensor; the row where blocks are rows.
        start: index of its first value.
        absmax: largest magnitude of the reference in it.
    """

    relative_rms: float
    block: int
    start: tuple[int, ...]
    absmax: float


@dataclasses.dataclass(frozen=True)
class ErrorStatistics:
    """How far a tensor is from its reference.

    Args:
        squared_error: sum of the squared differences.
        squared_reference: sum of the squared values of the reference.
        max_abs: largest difference.
        unlike_nonfinite: places where one is NaN or infinite and the other differs; places that
            are not finite are in none of the sums.
        blocksize: values of a block; the length of a row where blocks are rows.
        per_row: whether blocks are rows.
        worst_blocks: blocks of largest relative RMS error, worst first.
    """

    squared_error: float
    squared_reference: float
    max_abs: float
    unlike_nonfinite: int
    blocksize: int
    per_row: bool
    worst_blocks: tuple[BlockError, ...]

    @property
    def relative_rms(self) -> float:
        """``||error|| / ||reference||``, Frobenius norms; infinite if NaN or infinity differ."""
        if self.unlike_nonfinite:
            return math.inf
        return relative(self.squared_error, self.squared_reference)


def total_error(errors: Iterable[ErrorStatistics | None]) -> float | None:
    """The relative RMS error of several tensors as if they were one; None if none has one."""
    some = [error for error in errors if error is not None]
    if not some:
        return None
    if any(error.unlike_nonfinite for error in some):
        return math.inf
    squared_error = math.fsum(error.squared_error for error in some)
    return relative(squared_error, math.fsum(error.squared_reference for error in some))


def relative(squared_error: float, squared_reference: float) -> float:
    """The square root of the ratio; 0 for two zeros."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_reference) if squared_reference else math.inf
