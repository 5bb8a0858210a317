"""What ``convert_checkpoint`` did, or would do: as data, as JSON values, as a text. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qkern.checkpoint.outcomes import COPIED, ITEM_SIZES, LEFT_OUT, Outcome
from qkern.formats import QuantFormat
from qkern.text_table import format_bytes, format_table

_SHOWN = 5  # names of a text, for each reason


@dataclasses.dataclass(frozen=True)
class ConvertedTensor:
    """One tensor.

    Args:
        name: its key.
        file: name of the file that holds it after.
        shape: of the dense tensor, after.
        stored_as: name of its format before, or its dtype.
        format: after; None if it is dense.
        dtype: of the dense tensor, after.
        action: "copied", "cast", "codes copied", "dequantized", "quantized", "merged",
            "replaced" or "left out".
        reason: why it is not as asked; may be empty.
        nbytes_before: as it was stored.
        nbytes: as it is stored.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    stored_as: str
    format: QuantFormat | None
    dtype: str
    action: str
    reason: str
    nbytes_before: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        content = dataclasses.asdict(self)
        return content | {"shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of a checkpoint; ``print(report)`` is a text.

    Args:
        source: the checkpoint that was read.
        path: where the new one is.
        to: what was asked for.
        tensors: in the order of the files.
        tied: names that share the memory of another tensor, which is the value.
        files: names of all files that were written.
        left_out: files of the source that were not copied, and why.
        dry_run: whether nothing was written.
        resumed: entries that a run before had finished.
        nbytes_read: of the files that were read.
        seconds: until the last byte was written; 0 in a dry run, as the next.
        seconds_commit: for making the files durable and renaming them, after that.
    """

    source: Path
    path: Path
    to: str
    tensors: tuple[ConvertedTensor, ...]
    tied: dict[str, str]
    files: tuple[str, ...]
    left_out: dict[str, str]
    dry_run: bool
    resumed: int = 0
    nbytes_read: int = 0
    seconds: float = 0.0
    seconds_commit: float = 0.0

    @property
    def nbytes_before(self) -> int:
        """Of all tensors as they were stored; tables are not counted."""
        return sum(row.nbytes_before for row in self.tensors)

    @property
    def nbytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(row.nbytes for row in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "source": str(self.source),
            "path": str(self.path),
            "to": self.to,
            "dry_run": self.dry_run,
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "resumed": self.resumed,
            "nbytes_read": self.nbytes_read,
            "seconds": self.seconds,
            "seconds_commit": self.seconds_commit,
            "tensors": [row.as_dict() for row in self.tensors],
            "tied": self.tied,
            "files": list(self.files),
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        headers = ("what", "from", "to", "tensors", "before", "after")
        parts = [format_table(self.summary(), headers)]
        reasons: dict[str, list[str]] = {}
        for row in self.tensors:
            if row.reason:
                reasons.setdefault(row.reason, []).append(row.name)
        if reasons:
            rows = [(_some(names), reason) for reason, names in reasons.items()]
            parts.append(format_table(rows, ("tensors", "why")))
        if self.left_out:
            parts.append(format_table(list(self.left_out.items()), ("not copied", "why")))
        return "\n\n".join([*parts, last_line(self)])

    def summary(self) -> list[tuple[str, str, str, int, str, str]]:
        """Rows: what was done, from what, to what, how many tensors, bytes before and after."""
        groups: dict[tuple[str, str, str], list[ConvertedTensor]] = {}
        for row in self.tensors:
            after = row.dtype if row.format is None else row.format.quant_type
            groups.setdefault((row.action, row.stored_as, after), []).append(row)
        return [
            (
                *key,
                len(rows),
                format_bytes(sum(row.nbytes_before for row in rows)),
                format_bytes(sum(row.nbytes for row in rows)),
            )
            for key, rows in groups.items()
        ]


def converted(outcome: Outcome) -> ConvertedTensor:
    """The row of an outcome."""
    tensor, fmt = outcome.tensor, outcome.format
    numel = 1
    for size in outcome.shape:
        numel *= size
    if fmt is not None:
        nbytes = fmt.nbytes(numel)
    elif outcome.action in (COPIED, LEFT_OUT):
        nbytes = tensor.nbytes if outcome.steps else 0
    else:
        nbytes = ITEM_SIZES[outcome.dtype] * numel
    return ConvertedTensor(
        name=outcome.name,
        file=outcome.file.name,
        shape=outcome.shape,
        stored_as=tensor.format.quant_type if tensor.format else tensor.dtype,
        format=fmt,
        dtype=outcome.dtype,
        action=outcome.action,
        reason=outcome.reason,
        nbytes_before=tensor.nbytes,
        nbytes=nbytes,
    )


def last_line(report: ConversionReport) -> str:
    """Where it is, how long it took."""
    if report.dry_run:
        return f"nothing was written: {len(report.files)} files would be, to {report.path}"
    last = f"{report.path}: {len(report.files)} files, {format_bytes(report.nbytes)} of tensors"
    if report.seconds > 0 and report.nbytes_read:
        last += (
            f"; read {format_bytes(report.nbytes_read)} in {report.seconds:.1f} s, and "
            f"{report.seconds_commit:.1f} s to make the files durable"
        )
    return last


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
