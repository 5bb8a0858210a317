"""Weights streamed from file to file by the native extension: what is read, what is written where.

A job says where a tensor's bytes or values lie, and where the result goes; all sizes and places are
known before the first byte is read. Jobs are independent, and their bytes do not depend on the
number of threads. Memory is a few chunks for each thread, and the scales of the weights at work.
No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from qkern import (
    _native,  # noqa: TID251 - streams without torch and without arrays
    codec,
)
from qkern.codec import F32
from qkern.formats import QuantFormat


class Span(NamedTuple):
    """A place in one of the files of a run."""

    file: int  # index into its inputs or outputs
    offset: int  # bytes from the start of the file


@dataclasses.dataclass(frozen=True)
class Dense:
    """Values of a dense weight, in row-major order.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        at: their first byte.
    """

    dtype: str
    at: Span


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Codes and scales of a quantized weight.

    Args:
        format: after ``for_shape``. Of a target with ``double_quant``, what is tried: see ``Done``.
        codes: their first byte; ``format.packed_size(numel)`` bytes.
        scales: first byte of the scales: fp32 (blocks,), or 8-bit codes (blocks,) and after them,
            without a gap, the second-level scales, fp32 (groups,). A target needs room for
            whichever is larger.
        nested: first byte of a source's second-level scales, where they lie elsewhere.
        offset: of a source's double-quantized scales.
    """

    format: QuantFormat
    codes: Span
    scales: Span
    nested: Span | None = None
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Codes and scales of a weight as MXFP4 and NVFP4 store them.

    Codes are E2M1, the first of two in the low half of a byte; blocks do not cross rows. A value
    is ``code * scale`` in fp32.

    Args:
        codes: their first byte.
        scales: the first scale, of one byte each.
        blocksize: values that share a scale.
        scale: "e8m0", a power of two; or "e4m3", which is taken ``* factor / divisor`` in fp32.
        factor: fp32, of the tensor.
        divisor: fp32, of the tensor.
    """

    codes: Span
    scales: Span
    blocksize: int
    scale: str
    factor: float = 1.0
    divisor: float = 1.0


# What bytes that are copied may become: a change and the bytes that are written for each one.
CHANGES: Final = {None: 1, "swapped_nibbles": 1, "e8m0_to_float32": 4}


@dataclasses.dataclass(frozen=True)
class CopyJob:
    """Bytes that go over as they are, or each by itself as something else.

    Args:
        name: of the tensor, for errors.
        nbytes: how many are read.
        source: their place among the inputs.
        target: their place among the outputs.
        change: one of ``CHANGES``: what each becomes.
    """

    name: str
    nbytes: int
    source: Span
    target: Span
    change: str | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What an adapter adds to a weight, in fp32: ``w[i, j] += sum over r of b[i, r] a[r, j]``.

    Args:
        a: (matrices * r * columns,) fp32, contiguous.
        b: (rows * r,) fp32, contiguous, with the scaling in it.
        base: dtype that a quantized weight is rounded to before: what the adapter was trained on.
        matrices: how many the weight is, each with as many of the rows and an ``a`` of its own.
    """

    a: F32
    b: F32
    base: str
    matrices: int = 1


@dataclasses.dataclass(frozen=True)
class WeightJob:
    """A weight that changes its form.

    Args:
        name: of the tensor, for errors.
        shape: of the dense tensor.
        source: its values or its codes, among the inputs.
        target: where the result goes, among the outputs.
        method: how a 4-bit target's codes are chosen, "absmax" or "search".
        measure: whether the errors of a quantized target are measured, see ``Errors``; with
            a delta those of a dense one always are.
        delta: what is added before; none by default.
        transposed: whether the target holds the matrices of the last two dimensions transposed, of
            which a quantized one can have one. A thread needs memory for one of them.
    """

    name: str
    shape: tuple[int, ...]
    source: Dense | Quantized | Blocks
    target: Dense | Quantized
    method: str = "absmax"
    measure: bool = False
    delta: Delta | None = None
    transposed: bool = False


class Errors(NamedTuple):
    """Sums over the values whose errors were measured.

    All values of a tensor of at most 2^18; of larger ones whole blocks at the start of each 2^18,
    2^13 values in all (of formats with a scale a row: as many whole rows).

    ``squared_error / squared`` is the square of the relative RMS error.
    """

    numel: int  # values that were measured
    squared: float  # sum of w^2
    squared_error: float  # sum of (decoded - w)^2
    max_error: float  # largest |decoded - w|
    squared_delta: float = 0.0  # sum of squares of what was added


class Done(NamedTuple):
    """What became of a job.

    ``double_quant`` is False where 8 bits could not hold the scales of a target: then they are
    fp32. ``offset`` belongs to double-quantized scales. Checksums are CRC-32 (that of ``zlib``) of
    the written bytes: the codes, or all bytes of a dense result; and the scales, second-level ones
    included.
    """

    job: int  # index
    double_quant: bool
    offset: float
    crc: int
    crc_scales: int
    errors: Errors | None


def run(
    jobs: Sequence[CopyJob | WeightJob],
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    *,
    mmap: bool = True,
    threads: int = 0,
    done: Callable[[Done], Any] = lambda _: None,
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Run ``jobs``; their order is the order in which they are begun.

    Args:
        jobs: what to do.
        inputs: files that are read.
        outputs: files that exist already, and are written at the places that jobs name.
        mmap: map dense values, a window at a time, which saves a copy. A file that is cut meanwhile
            ends the process then; if they are copied, that is a ``CorruptFileError``.
        threads: how many work, 0 for one per core.
        done: called on this thread after each job, when all its bytes are written (not fsynced).
            If it raises, the run ends with that.
        progress: called on this thread now and then with the bytes read since the last call.

    Raises:
        NonFiniteError: for NaN or infinity in a weight that is quantized, naming it, the first
            index and the count.
        CorruptFileError: if an input ends before what a job reads.
        OSError: if a file cannot be read or written, with its name; ``OutOfSpaceError`` if there is
            no room left.
    """
    _native.run_jobs(
        list(jobs),
        list(inputs),
        list(outputs),
        codec.nested_code_array(),
        lambda news: done(_named(news)),
        progress,
        mapped=mmap,
        threads=threads,
    )


def _named(news: tuple[Any, ...]) -> Done:
    job, double_quant, offset, crc, crc_scales, errors = news
    measured = None if errors is None else Errors(*errors)
    return Done(job, double_quant, offset, crc, crc_scales, measured)
