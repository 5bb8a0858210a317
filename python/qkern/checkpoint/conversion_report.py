"""What ``convert_checkpoint`` did, or would do: as data, as JSON values, as a text. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qkern.checkpoint.outcomes import COPIED, ITEM_SIZES, LEFT_OUT, Outcome
from qkern.checkpoint.run_report import RunReport
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport(RunReport):
    """What became of a checkpoint; ``print(report)`` is a text.

    Args:
        to: what was asked for.
        tensors: in the order of the files.
    """

    to: str
    tensors: tuple[ConvertedTensor, ...]

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
        return super().as_dict() | {
            "to": self.to,
            "nbytes_before": self.nbytes_before,
            "nbytes": self.nbytes,
            "tensors": [row.as_dict() for row in self.tensors],
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
        result = f", {format_bytes(self.nbytes)} of tensors"
        return "\n\n".join([*parts, *self.ending(result)])

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
    numel = math.prod(outcome.shape)
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


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
