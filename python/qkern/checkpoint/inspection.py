"""``inspect_checkpoint``: what quantization does, or did, to the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from qkern import arrays, codec, functional
from qkern.checkpoint.inspection_report import InspectionReport
from qkern.checkpoint.measure import (
    HISTOGRAM_BINS,
    I64,
    Values,
    dense_values,
    measure_error,
    measure_scales,
    measure_values,
)
from qkern.checkpoint.pairing import compare_names
from qkern.checkpoint.reader import CheckpointReader
from qkern.checkpoint.selection import RULE, select, vocab_size_of
from qkern.checkpoint.source import StoredTensor
from qkern.checkpoint.tensor_report import TensorReport
from qkern.errors import FormatError
from qkern.files import read_json
from qkern.formats import QuantFormat, resolve_format
from qkern.ops import host
from qkern.tensor import QuantizedTensor

# Told after each tensor: its bytes in the file, and the bytes of all that are inspected.
Progress = Callable[[int, int], None]


def inspect_checkpoint(
    path: str | PathLike[str],
    quant_type: str | QuantFormat = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    compare: str | PathLike[str] | None = None,
    outlier_rms: float = 6.0,
    worst_blocks: int = 5,
    histogram: bool = False,
    progress: Progress | None = None,
) -> InspectionReport:
    """Measure the tensors of a checkpoint; ``print(report)`` is a text, ``as_dict()`` for JSON.

    A dense checkpoint: each weight that ``quantize_model`` would quantize (by names and shapes,
    see ``selection.why_dense``) is quantized as asked, and its error is measured. A quantized one:
    formats, scales and codes as the file holds them. With ``compare``: nothing is quantized, the
    error is the distance to the tensor of the same name in the other checkpoint.

    Errors are ``||w - w'|| / ||w||`` (Frobenius norms), with w the dense tensor or the other
    checkpoint's, of fp32 values before any rounding to a compute dtype. One tensor is in memory at
    a time, packed; its values are decoded in pieces.

    Args:
        path: a directory with safetensors files, or one such file.
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``; for dense checkpoints,
            like the next five.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: store the scales in 8 bits; unused by int8_row.
        method: how codes are chosen, "absmax" or "search", see ``qkern.quantize``.
        include: names, ends of names or globs of tensors to quantize whatever their shape.
        exclude: the same of tensors to leave dense.
        compare: the reference, dense or quantized in any format. Blocks are those of the tensor
            at ``path`` if it is quantized, else those of the reference, else of ``quant_type``.
            A Conv1D's weight, (in, out) in dense files, meets the transpose that is quantized.
        outlier_rms: values beyond this many times their tensor's RMS count as outliers.
        worst_blocks: blocks (rows of int8_row) of largest error to name for each tensor.
        histogram: also count the weights by ``x / RMS``, over all quantizable tensors.
        progress: called after each tensor.

    Raises:
        FileNotFoundError: if there are no safetensors weights.
        CorruptFileError: if a file is not readable, or contradicts itself.
        FormatError: for an unknown setting, a method that the format has not, or a pattern that
            matches no tensor.
    """
    settings = _Settings(
        resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant),
        method,
        outlier_rms,
        worst_blocks,
    )
    with CheckpointReader(path) as here:
        reasons = _reasons(here, _patterns(include), _patterns(exclude))
        counts = np.zeros(HISTOGRAM_BINS + 2, np.int64) if histogram else None
        job = _Inspection(here, settings, reasons, counts, progress)
        if compare is None:
            rows, comparison = job.run(), None
        else:
            with CheckpointReader(compare) as there:
                comparison = compare_names(here, there)
                rows = job.run(there, comparison.transposed)
        asked = None if here.is_quantized or compare is not None else settings.format
        return InspectionReport(
            path=here.path,
            is_quantized=here.is_quantized,
            format=asked,
            method=None if asked is None else method,
            rule=None if asked is None else RULE,
            tensors=rows,
            tied=tuple(here.tied.items()),
            comparison=comparison,
            outlier_rms=outlier_rms,
            histogram=None if counts is None else tuple(counts.tolist()),
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    format: QuantFormat
    method: str
    outlier_rms: float
    worst_blocks: int

    def __post_init__(self) -> None:
        codec.check_method(self.method, self.format, has_importance=False)
        if not self.outlier_rms > 0 or self.worst_blocks < 0:
            msg = (
                f"outlier_rms is {self.outlier_rms}, worst_blocks {self.worst_blocks}: "
                "more than 0, and 0 or more are allowed"
            )
            raise FormatError(msg)


@dataclasses.dataclass(frozen=True)
class _Inspection:
    """One run over a checkpoint.

    Args:
        reader: the checkpoint.
        settings: what to do with dense tensors.
        reasons: why tensors are dense; empty for what is to be quantized.
        histogram: counts to add to, None for none.
        progress: told after each tensor.
    """

    reader: CheckpointReader
    settings: _Settings
    reasons: dict[str, str]
    histogram: I64 | None
    progress: Progress | None

    def run(
        self, other: CheckpointReader | None = None, transposed: Collection[str] = ()
    ) -> tuple[TensorReport, ...]:
        total = sum(stored.nbytes for stored in self.reader.tensors.values())
        rows = []
        for stored in self.reader.tensors.values():
            if other is None:
                rows.append(self._inspect(stored))
            else:
                flipped = stored.name in transposed
                rows.append(self._compare(stored, other, transposed=flipped))
            if self.progress is not None:
                self.progress(stored.nbytes, total)
        return tuple(rows)

    def _inspect(self, stored: StoredTensor) -> TensorReport:
        row, tensor = self._describe(stored)
        if tensor is None or isinstance(tensor, QuantizedTensor) or row.reason:
            return row
        if row.values is not None and row.values.nonfinite:
            reason = f"{row.values.nonfinite} NaN or infinite values: quantizing refuses them"
            return dataclasses.replace(row, reason=reason)
        fmt = self.settings.format.for_shape(stored.shape)
        q = _quantize(tensor, fmt, self.settings.method)
        error = measure_error(
            Values(q), Values(tensor), blocks_of=fmt, worst=self.settings.worst_blocks
        )
        kept = q.format == fmt
        return dataclasses.replace(
            row,
            format=q.format,
            reason="" if kept else "fp32 scales: 8 bits cannot hold them",
            nbytes=q.nbytes,
            scales=measure_scales(q),
            error=error,
        )

    def _compare(
        self, stored: StoredTensor, other: CheckpointReader, *, transposed: bool
    ) -> TensorReport:
        row, tensor = self._describe(stored)
        theirs = other.tensors.get(stored.name)
        if tensor is None or theirs is None or not theirs.is_readable:
            return row
        if theirs.shape != stored.shape and not transposed:
            return row
        reference = other.read(stored.name)
        if transposed and stored.format is None:
            tensor = tensor.mT
        elif transposed:
            reference = dense_values(reference).mT
        fmt = stored.format or theirs.format or self.settings.format
        error = measure_error(
            Values(tensor),
            Values(reference),
            blocks_of=fmt.for_shape(tuple(tensor.shape)),
            worst=self.settings.worst_blocks,
        )
        return dataclasses.replace(row, error=error)

    def _describe(self, stored: StoredTensor) -> tuple[TensorReport, Any]:
        """What does not depend on a reference, and the tensor if it can be read."""
        tensor: Tensor | QuantizedTensor | None = None
        values = scales = None
        reason = self.reasons.get(stored.name, "")
        if stored.is_readable:
            tensor = self.reader.read(stored.name)
            if tensor.is_floating_point():
                counted = stored.format is not None or not reason
                values = measure_values(
                    Values(tensor),
                    outlier_rms=self.settings.outlier_rms,
                    histogram=self.histogram if counted else None,
                )
        if isinstance(tensor, QuantizedTensor):
            scales = measure_scales(tensor)
        row = TensorReport(
            name=stored.name,
            file=stored.file.name,
            shape=stored.shape,
            dtype=stored.dtype,
            stored=stored.format,
            format=stored.format,
            reason=reason,
            nbytes_stored=stored.nbytes,
            nbytes=stored.nbytes,
            values=values,
            scales=scales,
            error=None,
        )
        return row, tensor


def _quantize(tensor: Tensor, fmt: QuantFormat, method: str) -> QuantizedTensor:
    """By the codec itself: the first call of a torch operator imports for seconds."""
    array = host.as_array(tensor).reshape(tensor.shape)
    dtype = host.dtype_name(tensor.dtype)
    return functional.from_array(arrays.quantize(array, fmt, method=method, dtype=dtype))


def _reasons(
    reader: CheckpointReader, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, str]:
    """Why tensors are, or would stay, dense, or have scales unlike the others'."""
    dense = [tensor for tensor in reader.tensors.values() if tensor.format is None]
    config = reader.path / "config.json"
    vocab_size = vocab_size_of(read_json(config)) if config.is_file() else None
    reasons = select(dense, include=include, exclude=exclude, vocab_size=vocab_size)
    if not reader.is_quantized:
        return reasons
    formats = {tensor.name: tensor.format for tensor in reader.tensors.values() if tensor.format}
    single = [
        name
        for name, fmt in formats.items()
        if "nested" in fmt.kind.scales and not fmt.double_quant
    ]
    if any(fmt.double_quant for fmt in formats.values()):
        reasons |= dict.fromkeys(single, "fp32 scales, others have 8-bit ones")
    unsaid = (name for name, reason in reasons.items() if not reason)
    return reasons | dict.fromkeys(unsaid, "left dense in the file")


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
