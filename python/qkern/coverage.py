"""What ``quantize_model`` did: every weight of a model, quantized or left alone and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qkern.errors import CoverageError
from qkern.text_table import format_bytes, format_table


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One weight.

    Args:
        name: path of its module.
        shape: of the dense weight.
        status: the format's name, or "dense".
        reason: why it is dense, or what differs from what was asked; empty otherwise.
        numel: values; 0 for a weight that another row counts, as are the next two.
        bytes_before: of the dense weight.
        bytes_after: as stored now.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    reason: str
    numel: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class CoverageReport:
    """All weights of a model; ``print(report)`` is a table."""

    rows: tuple[CoverageRow, ...]

    @property
    def coverage(self) -> float:
        """Share of the values that are quantized, 0 to 1."""
        total = sum(row.numel for row in self.rows)
        return sum(row.numel for row in self.quantized) / total if total else 0.0

    @property
    def quantized(self) -> tuple[CoverageRow, ...]:
        """Rows that are quantized."""
        return tuple(row for row in self.rows if row.status != "dense")

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights now."""
        return sum(row.bytes_after for row in self.rows)

    @classmethod
    def of(cls, rows: Iterable[CoverageRow], tied: Mapping[str, str]) -> CoverageReport:
        """Of rows, and of names that share another one's memory, which is counted there."""
        counted = tuple(rows)
        shapes = {row.name: row.shape for row in counted}
        shared = (
            CoverageRow(name, shapes[owner], "dense", f"shares its memory with {owner}", 0, 0, 0)
            for name, owner in tied.items()
        )
        return cls((*counted, *shared))

    def as_dict(self, rule: str | None) -> dict[str, Any]:
        """The sums as JSON values; ``rule`` says how it was decided what is quantized."""
        return {
            "rule": rule,
            "share": self.coverage,
            "quantized": len(self.quantized),
            "tensors": len(self.rows),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def check(self, least: float) -> None:
        """Refuse a coverage below ``least``, 0 to 1.

        Raises:
            CoverageError: with the whole table.
        """
        if self.coverage < least:
            msg = (
                f"{self.coverage:.1%} of the values are quantized, at least {least:.1%} "
                f"were asked for:\n{self}"
            )
            raise CoverageError(msg)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[CoverageRow]] = {}
        for row in self.rows:
            name = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", row.name)
            key = (name, "x".join(map(str, row.shape)), row.status, row.reason)
            groups.setdefault(key, []).append(row)
        cells = []
        for (name, shape, status, reason), rows in groups.items():
            before = format_bytes(sum(row.bytes_before for row in rows))
            after = format_bytes(sum(row.bytes_after for row in rows))
            cells.append((name, len(rows), shape, status, before, after, reason))
        headers = ("weight", "count", "shape", "stored as", "before", "after", "why")
        return (
            f"{format_table(cells, headers)}\n"
            f"{len(self.quantized)} of {len(self.rows)} weights quantized, "
            f"{self.coverage:.1%} of the values; "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )
