"""What ``quantize_checkpoint`` did, or would do: as data, as JSON values, as a text. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qkern.checkpoint.run_report import RunReport, plain
from qkern.checkpoint.stream import Errors
from qkern.checkpoint.weight_statistics import relative
from qkern.coverage import CoverageReport, CoverageRow
from qkern.formats import QuantFormat
from qkern.text_table import format_table

_SHOWN = 5  # worst tensors of a text


@dataclasses.dataclass(frozen=True)
class TensorResult:
    """One tensor.

    Args:
        name: its key.
        file: name of the file that holds it, before and after.
        shape: of the dense tensor.
        dtype: of the dense tensor.
        format: that it was quantized to; None if it is dense.
        reason: why it is dense, or what differs from what was asked; empty otherwise.
        expected: whether nobody would be surprised that it is dense.
        nbytes_before: of the dense tensor.
        nbytes: of codes and scales, or of the dense tensor.
        errors: sums over the measured values; None if it is dense, or nothing was written.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    format: QuantFormat | None
    reason: str
    expected: bool
    nbytes_before: int
    nbytes: int
    errors: Errors | None

    @property
    def numel(self) -> int:
        """Values of the dense tensor."""
        return math.prod(self.shape)

    @property
    def relative_rms(self) -> float | None:
        """``||w - w'|| / ||w||`` over the measured values; None if none were."""
        if self.errors is None:
            return None
        return relative(self.errors.squared_error, self.errors.squared)

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        values: dict[str, Any] = {
            "name": self.name,
            "file": self.file,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "format": None if self.format is None else dataclasses.asdict(self.format),
            "reason": self.reason,
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "relative_rms": self.relative_rms,
            "errors": None if self.errors is None else self.errors._asdict(),
        }
        return {key: plain(value) for key, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport(RunReport):
    """What became of a dense checkpoint; ``print(report)`` is a text.

    Args:
        format: that was asked for.
        method: how codes were chosen.
        rule: how it was decided what is quantized.
        tensors: in natural order of the names.
    """

    format: QuantFormat
    method: str
    rule: str
    tensors: tuple[TensorResult, ...]

    @property
    def coverage(self) -> CoverageReport:
        """What is quantized, and why the rest is not."""
        rows = (
            CoverageRow(
                name=row.name,
                shape=row.shape,
                status=row.format.quant_type if row.format else "dense",
                reason=row.reason,
                numel=row.numel,
                bytes_before=row.nbytes_before,
                bytes_after=row.nbytes,
            )
            for row in self.tensors
        )
        return CoverageReport.of(rows, self.tied)

    @property
    def relative_rms(self) -> float | None:
        """The error of all quantized tensors as if they were one; None if none was measured."""
        errors = [row.errors for row in self.tensors if row.errors is not None]
        if not errors:
            return None
        squared_error = math.fsum(error.squared_error for error in errors)
        return relative(squared_error, math.fsum(error.squared for error in errors))

    @property
    def bits_per_weight(self) -> float | None:
        """Over the quantized tensors; None if there is none."""
        rows = [row for row in self.tensors if row.format is not None]
        numel = sum(row.numel for row in rows)
        return 8 * sum(row.nbytes for row in rows) / numel if numel else None

    @property
    def worst(self) -> tuple[TensorResult, ...]:
        """Measured tensors by relative RMS error, worst first."""
        rows = [(-(row.relative_rms or 0.0), row) for row in self.tensors if row.errors is not None]
        return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))

    @property
    def surprises(self) -> tuple[TensorResult, ...]:
        """What ``strict`` refuses.

        Dense weights that could be expected to be quantized; fp32 scales in place of 8-bit ones.
        """
        return tuple(
            row
            for row in self.tensors
            if (row.format is None and not row.expected)
            or (row.format is not None and "8 bits cannot hold" in row.reason)
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN and infinity, which JSON has not, become None."""
        values: dict[str, Any] = plain(
            {
                **super().as_dict(),
                "format": dataclasses.asdict(self.format),
                "method": self.method,
                "relative_rms": self.relative_rms,
                "bits_per_weight": self.bits_per_weight,
                "coverage": self.coverage.as_dict(self.rule),
                "worst": [row.name for row in self.worst],
                "tensors": [row.as_dict() for row in self.tensors],
            }
        )
        return values

    def __str__(self) -> str:
        parts = [f"coverage, {self.rule}\n{self.coverage}"]
        if self.worst:
            parts.append(f"worst of {len(self.worst)}, by rel rms\n{error_table(self)}")
        error = self.relative_rms
        result = "" if error is None else f", relative rms error {error:.4g}"
        return "\n\n".join([*parts, *self.ending(result)])


def error_table(report: QuantizationReport) -> str:
    """The tensors of largest error."""
    rows = [
        (row.name, row.relative_rms or 0.0, row.errors.max_error)
        for row in report.worst[:_SHOWN]
        if row.errors is not None
    ]
    return format_table(rows, ("tensor", "rel rms", "max error"))
