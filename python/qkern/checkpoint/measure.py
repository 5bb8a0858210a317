"""What is measured of a weight: its values, its scales and codes, and its error, block by block.

Values are read in pieces (``Values.read``), so that no tensor is dense as a whole in fp32. All sums
are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkern import codec
from qkern.checkpoint.weight_statistics import (
    BlockError,
    ErrorStatistics,
    ScaleStatistics,
    ValueStatistics,
)
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat
from qkern.ops import host
from qkern.tensor import QuantizedTensor

# Values of a piece (a row, if blocks are longer rows): fp64 temporaries stay in the outer cache.
PIECE: Final = 1 << 16
# The histogram, in units of a tensor's RMS: an odd number of bins, so that 0 is inside of one.
HISTOGRAM_LIMIT: Final = 10.05
HISTOGRAM_BINS: Final = 201

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


class Values:
    """The values of a dense or quantized tensor on the CPU, to be read in pieces.

    Args:
        tensor: of any shape.
    """

    def __init__(self, tensor: Tensor | QuantizedTensor) -> None:
        self.shape = tuple(tensor.shape)
        self.numel = tensor.numel()
        self._format = tensor.format if isinstance(tensor, QuantizedTensor) else None
        if isinstance(tensor, QuantizedTensor):
            parts = host.as_parts(tensor.parts)
            self._parts = codec.Parts(parts.packed, codec.decode_absmax(parts), None, None)
        else:
            self._flat = tensor.reshape(-1)

    def read(self, first: int, last: int) -> Tensor:
        """fp64 values of the flat indices from ``first`` to ``last`` (exclusive), wherever."""
        fmt = self._format
        if fmt is None:
            return self._flat[first:last].double()
        start = first - first % 2 if fmt.bits == 4 else first  # two values in a byte
        # To the end of the block that first is in, and on from there.
        middle = min(-(-first // fmt.blocksize) * fmt.blocksize, last)
        out = torch.empty(last - start, dtype=torch.float32)
        for begin, end in ((start, middle), (middle, last)):
            if begin < end:
                part = host.as_buffer(out[begin - start : end - start])
                codec.decode_range(self._parts, fmt, begin, end, part, "float32")
        return out[first - start :].double()

    def pieces(self, blocksize: int = 1) -> Iterator[tuple[int, Tensor]]:
        """First index and values of every piece, each of whole blocks but for the last."""
        step = max(PIECE // blocksize, 1) * blocksize
        for first in range(0, self.numel, step):
            yield first, self.read(first, min(first + step, self.numel))


def dense_values(tensor: Tensor | QuantizedTensor) -> Tensor:
    """The tensor; of a quantized one, its fp32 values before any rounding, in its shape."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor
    return Values(tensor).read(0, tensor.numel()).float().view(tensor.shape)


def measure_values(
    values: Values, *, outlier_rms: float, histogram: I64 | None = None
) -> ValueStatistics:
    """Two passes over a tensor.

    Args:
        values: the tensor.
        outlier_rms: see ``ValueStatistics.outliers``.
        histogram: int64 (``HISTOGRAM_BINS`` + 2,), counts of ``x / rms`` that are added to: below
            the limit, in the bins, above.
    """
    moments = _Moments()
    for first, piece in values.pieces():
        moments.add(first, piece)
    rms = moments.rms
    outliers = 0
    if rms > 0 and (histogram is not None or moments.max_abs > outlier_rms * rms):
        for _, piece in values.pieces():
            scaled = _finite(piece) / rms
            outliers += int((scaled.abs() > outlier_rms).sum())
            if histogram is not None:
                histogram += _bin(scaled)
    elif histogram is not None:
        histogram[1 + HISTOGRAM_BINS // 2] += moments.count
    return ValueStatistics(
        nonfinite=moments.nonfinite,
        first_nonfinite=moments.first_nonfinite,
        rms=rms,
        max_abs=moments.max_abs,
        kurtosis=moments.kurtosis,
        crest_factor=moments.max_abs / rms if rms > 0 else None,
        outliers=outliers,
    )


def measure_scales(q: QuantizedTensor) -> ScaleStatistics:
    """The scales and codes of a quantized tensor on the CPU."""
    parts = host.as_parts(q.parts)
    absmax = codec.decode_absmax(parts).astype(np.float64)
    finite = np.isfinite(absmax)
    size = np.where(finite, np.abs(absmax), 0)
    some = size[size > 0]
    counts = _count_codes(q)
    share = counts[counts > 0] / max(q.numel(), 1)
    return ScaleStatistics(
        blocks=absmax.size,
        min_abs=float(some.min()) if some.size else None,
        max_abs=float(some.max()) if some.size else None,
        zero=int((absmax == 0).sum()),
        negative=int((absmax < 0).sum()),
        turned=_count_turned(absmax, parts),
        nonfinite=int((~finite).sum()),
        group_ratio=_group_ratio(size) if "nested" in q.format.kind.scales else None,
        code_counts=tuple(counts.tolist()),
        code_entropy=abs(float(-(share * np.log2(share)).sum())),
    )


def measure_error(
    values: Values, reference: Values, *, blocks_of: QuantFormat, worst: int = 5
) -> ErrorStatistics:
    """The difference of two tensors of one shape.

    Args:
        values: the tensor.
        reference: what it stands for.
        blocks_of: the format whose blocks are looked at, after ``for_shape``.
        worst: how many blocks to name.
    """
    blocksize = blocks_of.blocksize
    squared_error = squared_reference = max_abs = 0.0
    unlike, found = 0, _WorstBlocks(worst, blocksize, reference.shape)
    for first, piece in reference.pieces(blocksize):
        got, expected = values.read(first, first + len(piece)), piece
        if not (_is_finite(got) and _is_finite(expected)):
            bad = ~(got.isfinite() & expected.isfinite())
            alike = (got == expected) | (got.isnan() & expected.isnan())
            unlike += int((bad & ~alike).sum())
            got, expected = (t.masked_fill(bad, 0.0) for t in (got, expected))
        error, blocks = (_blocks(t, blocksize) for t in (got - expected, expected))
        errors, references = (torch.linalg.vector_norm(t, dim=1) for t in (error, blocks))
        squared_error += float(errors.dot(errors))
        squared_reference += float(references.dot(references))
        max_abs = max(max_abs, *(abs(float(end)) for end in error.aminmax()))
        found.add(first // blocksize, torch.where(errors == 0, 0.0, errors / references), blocks)
    return ErrorStatistics(
        squared_error=squared_error,
        squared_reference=squared_reference,
        max_abs=max_abs,
        unlike_nonfinite=unlike,
        blocksize=blocksize,
        per_row=blocks_of.kind.per_row,
        worst_blocks=found.sorted(),
    )


class _WorstBlocks:
    """The blocks of largest relative error so far."""

    def __init__(self, count: int, blocksize: int, shape: tuple[int, ...]) -> None:
        self._count, self._blocksize, self._shape = count, blocksize, shape
        self._found: list[tuple[float, int, float]] = []  # error, minus the block, absmax

    def add(self, first: int, errors: Tensor, blocks: Tensor) -> None:
        """Relative errors (b,) and values (b, blocksize) of the blocks from ``first``."""
        full = self._count and len(self._found) == self._count
        least = self._found[-1][0] if full else -1.0
        top = errors.topk(min(self._count, len(errors)))
        for error, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if error > least:
                absmax = float(blocks[i].abs().max())
                self._found.append((error, -(first + i), absmax))
        self._found = sorted(self._found, reverse=True)[: self._count]

    def sorted(self) -> tuple[BlockError, ...]:
        """Worst first; of equal ones the first in the tensor."""
        found = []
        for error, block, absmax in self._found:
            start = np.unravel_index(-block * self._blocksize, self._shape)
            found.append(BlockError(error, -block, tuple(int(i) for i in start), absmax))
        return tuple(found)


class _Moments:
    """Power sums about a value near the mean, which keeps them exact for values far from 0."""

    def __init__(self) -> None:
        self.count = self.nonfinite = 0
        self.first_nonfinite: int | None = None
        self._low, self._high = math.inf, -math.inf
        self._shift: float | None = None
        self._square = 0.0
        self._sums = [0.0] * 4

    def add(self, first: int, piece: Tensor) -> None:
        if not _is_finite(piece):
            bad = ~piece.isfinite()
            if self.first_nonfinite is None:
                self.first_nonfinite = first + int(bad.to(torch.uint8).argmax())
            self.nonfinite += int(bad.sum())
            piece = piece[~bad]
        if not piece.numel():
            return
        if self._shift is None:
            self._shift = float(piece.mean())
        self.count += piece.numel()
        low, high = piece.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._square += float(piece.dot(piece))
        d = piece - self._shift
        d2 = d * d
        for i, power_sum in enumerate((d.sum(), d2.sum(), d2.dot(d), d2.dot(d2))):
            self._sums[i] += float(power_sum)

    @property
    def max_abs(self) -> float:
        return max(abs(self._low), abs(self._high)) if self.count else 0.0

    @property
    def rms(self) -> float:
        return math.sqrt(self._square / self.count) if self.count else 0.0

    @property
    def kurtosis(self) -> float | None:
        if self._low >= self._high:
            return None
        m1, m2, m3, m4 = (power_sum / self.count for power_sum in self._sums)
        variance = m2 - m1**2
        if not 0 < variance < math.inf:
            return None
        central = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        found = central / variance**2
        return found if math.isfinite(found) else None


def _is_finite(piece: Tensor) -> bool:
    """Quick where all is finite: one sum."""
    return math.isfinite(piece.sum()) or bool(piece.isfinite().all())


def _finite(piece: Tensor) -> Tensor:
    return piece if _is_finite(piece) else piece[piece.isfinite()]


def _blocks(piece: Tensor, blocksize: int) -> Tensor:
    """(blocks, blocksize); the last block is filled up with zeros."""
    missing = -piece.numel() % blocksize
    return (torch.nn.functional.pad(piece, (0, missing)) if missing else piece).view(-1, blocksize)


def _bin(scaled: Tensor) -> I64:
    """Counts below the limit, in the bins, above it: int64 (``HISTOGRAM_BINS`` + 2,)."""
    limit = HISTOGRAM_LIMIT
    counts = torch.histc(scaled, HISTOGRAM_BINS, -limit, limit)
    below, above = (scaled < -limit).sum(), (scaled > limit).sum()
    return torch.cat([below[None], counts.long(), above[None]]).numpy()


def _count_codes(q: QuantizedTensor) -> I64:
    """How often each code occurs: (16,), or (256,) from -128 for int8."""
    packed = host.as_array(q.packed).view(np.uint8)
    counts = np.zeros(256, np.int64)
    for first in range(0, packed.size, PIECE):  # bincount makes int64 of its input
        counts += np.bincount(packed[first : first + PIECE], minlength=256)
    if q.format.bits == 8:
        return np.roll(counts, 128)  # bytes of negative codes are the upper half
    nibbles: I64 = counts.reshape(16, 16).sum(1) + counts.reshape(16, 16).sum(0)
    if q.numel() % 2:  # the low half of the last byte is padding
        nibbles[int(packed[-1]) & 15] -= 1
    return nibbles


def _count_turned(absmax: F64, parts: codec.Parts) -> int:
    """Negative scales, decoded from ``parts``, that may have been positive."""
    if parts.nested_absmax is None or parts.offset is None or parts.offset[0] == 0:
        return 0
    nested = np.abs(parts.nested_absmax.astype(np.float64))
    reach = np.repeat(nested, NESTED_BLOCKSIZE)[: absmax.size] / 128
    return int(((absmax < 0) & (absmax >= -reach)).sum())


def _group_ratio(size: F64) -> float | None:
    """The largest ratio of two magnitudes, not 0, in a group of 256."""
    padded = np.pad(size, (0, -size.size % NESTED_BLOCKSIZE)).reshape(-1, NESTED_BLOCKSIZE)
    largest = padded.max(axis=1)
    smallest = np.where(padded == 0, np.inf, padded).min(axis=1)
    some = largest > 0
    return float((largest[some] / smallest[some]).max()) if some.any() else None
