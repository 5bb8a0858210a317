"""What ``merge_checkpoint`` did, or would do: as data, as JSON values, as a text. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qkern.checkpoint.conversion_report import ConversionReport
from qkern.checkpoint.run_report import plain
from qkern.checkpoint.stream import Errors
from qkern.checkpoint.weight_statistics import relative
from qkern.merge_loss import SHOWN, kept_cells, kept_share, kept_table, share_text, worst_of

_LITTLE = 0.5  # what is worth a word


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A weight that an adapter was added to.

    Args:
        name: its key.
        rank: of the adapter.
        scaling: of the product of its factors.
        is_quantized: whether the sum was quantized again.
        errors: sums over the measured values, ``squared_error`` of the result against the exact
            sum; None if nothing was written.
        aware: whether the adapter was trained for this rounding (``merge_into``), so that nothing
            is lost: the layer has been multiplying the result.
    """

    name: str
    rank: int
    scaling: float
    is_quantized: bool
    errors: Errors | None
    aware: bool = False

    @property
    def loss(self) -> Errors | None:
        """The errors against what the adapter was trained with."""
        if self.errors is None or not self.aware:
            return self.errors
        return self.errors._replace(squared_error=0.0)

    @property
    def kept(self) -> float | None:
        """``1 - ||result - exact|| / ||delta||``; None if none was measured, or delta is 0."""
        return None if self.loss is None else kept_share([self.loss])

    @property
    def relative_delta(self) -> float | None:
        """``||delta|| / ||exact sum||``."""
        return self.errors and relative(self.errors.squared_delta, self.errors.squared)

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        values: dict[str, Any] = plain(
            dataclasses.asdict(self)
            | {
                "errors": None if self.errors is None else self.errors._asdict(),
                "kept": self.kept,
                "relative_delta": self.relative_delta,
            }
        )
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport(ConversionReport):
    """What became of a checkpoint and an adapter; ``print(report)`` is a text.

    Args:
        adapter: the directory of the adapter.
        base_check: whether the base is the one that the adapter was trained over.
        merged: weights that it was added to.
        missed: what the adapter was trained to be merged into, if it is not the result; else empty.
    """

    adapter: Path
    base_check: str
    merged: tuple[MergedTensor, ...]
    missed: str = ""

    @property
    def kept(self) -> float | None:
        """Over all weights as if they were one."""
        return kept_share(row.loss for row in self.merged if row.loss is not None)

    @property
    def kept_by_quantized(self) -> float | None:
        """Over those that were quantized again."""
        rows = (row for row in self.merged if row.is_quantized)
        return kept_share(row.loss for row in rows if row.loss is not None)

    @property
    def worst(self) -> tuple[MergedTensor, ...]:
        """Measured weights by how much is kept, least first."""
        return worst_of(self.merged)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN and infinity, which JSON has not, become None."""
        return super().as_dict() | {
            "adapter": str(self.adapter),
            "base_check": self.base_check,
            "kept": plain(self.kept),
            "missed": self.missed,
            "merged": [row.as_dict() for row in self.merged],
        }

    def kept_table(self) -> str:
        """The weights of which least is kept."""
        return kept_table(self.worst[:SHOWN])

    def kept_rows(self, count: int) -> list[tuple[str, int, str, str]]:
        """Name, rank, size of the delta, what is kept, of the worst."""
        return kept_cells(self.worst[:count])

    def __str__(self) -> str:
        lines = [f"{self.adapter}: added to {len(self.merged)} weights; {self.base_check}"]
        aware = sum(row.aware for row in self.merged)
        if aware:
            lines.append(f"{aware} of them were trained for this rounding: nothing of it is lost")
        if self.missed:
            lines.append(f"trained to be merged into {self.missed}: another result is not the same")
        if self.kept is not None:
            lines.append(f"kept of what it adds: {share_text(self.kept)}; least of")
            lines.append(self.kept_table())
            if self.kept < _LITTLE and self.kept_by_quantized is None and self.to != "float32":
                lines.append(f"{self.to} rounds most of it away: float32 keeps it")
        return "\n".join(lines) + f"\n\n{super().__str__()}"
