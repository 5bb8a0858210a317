"""What ``inspect_checkpoint`` found: as data, as JSON values, as a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from qkern.checkpoint.measure import HISTOGRAM_LIMIT
from qkern.checkpoint.run_report import plain
from qkern.checkpoint.tensor_report import TensorReport
from qkern.checkpoint.weight_statistics import BlockError, total_error
from qkern.coverage import CoverageReport, CoverageRow
from qkern.formats import KINDS, QuantFormat


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the names of two checkpoints meet.

    Args:
        path: the other one, which errors are relative to.
        only_here: names that the other one lacks.
        only_there: names that only the other one has.
        shapes: (name, shape here, shape there) where they differ.
        unread: names whose dtype is not read here or there.
        stored_there: format or dtype of each tensor in the other one.
        transposed: names of which one of the two holds the transpose of the other: a Conv1D, and
            the linear layer that it is. Their blocks are those of the linear layer's (out, in).
    """

    path: Path
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unread: tuple[str, ...]
    stored_there: dict[str, str]
    transposed: tuple[str, ...] = ()

    @property
    def quantized_there(self) -> frozenset[str]:
        """Names of what is quantized in the other one."""
        return frozenset(name for name, form in self.stored_there.items() if form in KINDS)

    @property
    def unpaired(self) -> tuple[str, ...]:
        """Every name that could not be compared."""
        unlike = tuple(name for name, _, _ in self.shapes)
        return (*self.only_here, *self.only_there, *unlike, *self.unread)


@dataclasses.dataclass(frozen=True)
class InspectionReport:
    """What ``inspect_checkpoint`` found.

    Args:
        path: of the checkpoint.
        is_quantized: whether its files hold quantized tensors.
        format: what a dense checkpoint was quantized to for a trial; None for any other report.
        method: how codes were chosen in that trial.
        rule: how it was decided what would be quantized; None if the file says it.
        tensors: in natural order of the names.
        tied: (name, name of the tensor whose memory it shares).
        comparison: with another checkpoint, None without one.
        outlier_rms: see ``ValueStatistics.outliers``.
        histogram: counts of ``x / RMS`` over ``histogram_edges``, with what is below and above at
            both ends; None unless asked for.
    """

    path: Path
    is_quantized: bool
    format: QuantFormat | None
    method: str | None
    rule: str | None
    tensors: tuple[TensorReport, ...]
    tied: tuple[tuple[str, str], ...]
    comparison: Comparison | None
    outlier_rms: float
    histogram: tuple[int, ...] | None

    @property
    def coverage(self) -> CoverageReport:
        """What is, or would be, quantized, and why the rest is not."""
        rows = (
            CoverageRow(
                name=row.name,
                shape=row.shape,
                status=row.format.quant_type if row.format else "dense",
                reason=row.reason,
                numel=row.numel,
                bytes_before=row.nbytes_dense,
                bytes_after=row.nbytes,
            )
            for row in self.tensors
        )
        return CoverageReport.of(rows, dict(self.tied))

    @property
    def relative_rms(self) -> float | None:
        """The error of all measured tensors as if they were one; None if there is none."""
        return total_error(row.error for row in self.tensors)

    @property
    def quantized_relative_rms(self) -> float | None:
        """The same of the tensors that are, or would be, quantized, here or in the other one."""
        return total_error(row.error for row in self.measured_quantized)

    @property
    def measured_quantized(self) -> tuple[TensorReport, ...]:
        """Tensors with an error that are, or would be, quantized, here or in the other one."""
        there = () if self.comparison is None else self.comparison.quantized_there
        return tuple(
            row
            for row in self.tensors
            if row.error is not None and (row.format is not None or row.name in there)
        )

    @property
    def bits_per_weight(self) -> float | None:
        """Over all tensors, dense ones included; None without values."""
        numel = sum(row.numel for row in self.tensors)
        return 8 * sum(row.nbytes for row in self.tensors) / numel if numel else None

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Over the tensors that are, or would be, quantized; None if none is."""
        rows = [row for row in self.tensors if row.format is not None]
        numel = sum(row.numel for row in rows)
        return 8 * sum(row.nbytes for row in rows) / numel if numel else None

    @property
    def worst(self) -> tuple[TensorReport, ...]:
        """Tensors that are quantized or have an error, worst first.

        By relative RMS error; without errors, by scales that are spoilt, then by the largest ratio
        of scales in a group, then (formats without such) by how little the codes are used.
        """
        rows = [row for row in self.tensors if row.error is not None or row.scales is not None]

        def badness(row: TensorReport) -> tuple[float, ...]:
            if row.error is not None:
                return (_nan_last(row.error.relative_rms), row.error.max_abs)
            if row.scales is None:
                return (0.0, 0.0)
            spoilt = float(row.scales.nonfinite + row.scales.turned)
            return (spoilt, row.scales.group_ratio or 0.0, -row.scales.code_entropy)

        return tuple(sorted(rows, key=badness, reverse=True))

    @property
    def worst_blocks(self) -> tuple[tuple[str, BlockError], ...]:
        """(tensor, block) of every tensor's worst blocks, worst first."""
        found = [
            (row.name, block)
            for row in self.tensors
            if row.error is not None
            for block in row.error.worst_blocks
        ]
        return tuple(sorted(found, key=lambda pair: -_nan_last(pair[1].relative_rms)))

    @property
    def histogram_edges(self) -> tuple[float, ...]:
        """Edges of the inner bins of ``histogram``, in units of a tensor's RMS."""
        bins = 0 if self.histogram is None else len(self.histogram) - 2
        return tuple(np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, bins + 1).tolist())

    def exceeding(self, max_error: float) -> tuple[str, ...]:
        """Tensors whose relative RMS error is above ``max_error``, or cannot be known.

        That is: values that are NaN or infinite, and in a comparison whatever has no counterpart.
        """
        found = [
            row.name
            for row in self.tensors
            if (row.error is not None and not row.error.relative_rms <= max_error)
            or (self.comparison is None and row.values is not None and row.values.nonfinite)
        ]
        return (*found, *(() if self.comparison is None else self.comparison.unpaired))

    def findings(self) -> list[tuple[str, str]]:
        """(tensor, what a person should know of it)."""
        found = [(row.name, text) for row in self.tensors for text in row.findings()]
        if self.comparison is not None:
            other = self.comparison.path
            found += [(name, f"not in {other}") for name in self.comparison.only_here]
            found += [(name, f"only in {other}") for name in self.comparison.only_there]
            found += [
                (name, f"shape {list(here)} here, {list(there)} in {other}")
                for name, here, there in self.comparison.shapes
            ]
            found += [(name, "dtype is not read: not compared") for name in self.comparison.unread]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN and infinity, which JSON has not, become None."""
        content: dict[str, Any] = {
            "path": str(self.path),
            "kind": "quantized" if self.is_quantized else "dense",
            "format": None if self.format is None else dataclasses.asdict(self.format),
            "method": self.method,
            "relative_rms": self.relative_rms,
            "quantized_relative_rms": self.quantized_relative_rms,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "coverage": self.coverage.as_dict(self.rule),
            "outlier_rms": self.outlier_rms,
            "worst": [row.name for row in self.worst],
            "findings": [{"tensor": name, "finding": text} for name, text in self.findings()],
            "tensors": [row.as_dict() for row in self.tensors],
            "tied": dict(self.tied),
            "comparison": None,
            "histogram": None,
        }
        if self.comparison is not None:
            content["comparison"] = dataclasses.asdict(self.comparison)
            content["comparison"]["path"] = str(self.comparison.path)
        if self.histogram is not None:
            below, *counts, above = self.histogram
            content["histogram"] = {
                "unit": "RMS of the tensor",
                "edges": self.histogram_edges,
                "counts": counts,
                "below": below,
                "above": above,
            }
        values: dict[str, Any] = plain(content)
        return values

    def __str__(self) -> str:
        from qkern.checkpoint.inspection_text import render

        return render(self)


def _nan_last(error: float) -> float:
    """For sorting: what is not a number is as bad as infinite."""
    return math.inf if math.isnan(error) else error
