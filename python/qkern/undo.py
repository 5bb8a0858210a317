"""What in-place additions to a quantized tensor replaced, so that they can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qkern.formats import QuantFormat
    from qkern.tensor import QuantizedTensor

# Codes and scales of one state.
Kept = tuple[Tensor | None, ...]
# How many additions can be taken back, each at the price of a copy of codes and scales.
_DEPTH = 4


@dataclasses.dataclass
class Undo:
    """Parts that the last in-place addition replaced, shared by all aliases of a tensor.

    PEFT merges an adapter by ``weight.data += delta`` and takes it back by ``-=``. Quantizing
    twice would change a good part of the bytes, so the inverse addition puts these back.

    Args:
        parts: what was there before; None after any other write.
        format: of these parts: a merge may change it.
        label: what the adder calls its addition, to ask for ``take_back`` instead of subtracting.
        older: parts, format and label of the additions before the last one, where several adapters
            were merged; the latest is the last.
        writes: how often the tensor was written to: torch counts no writes into its parts.
        moved: other parts, of another format, that all who share this have from now on.
    """

    parts: Kept | None = None
    format: QuantFormat | None = None
    label: str = ""
    older: tuple[tuple[Kept, QuantFormat | None, str], ...] = ()
    writes: int = 0
    moved: tuple[Kept, QuantFormat] | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Undo:
        """The same on other parts, for a copy of the tensor."""

        def mapped(parts: Kept) -> Kept:
            return tuple(None if part is None else fn(part) for part in parts)

        older = tuple((mapped(parts), *rest) for parts, *rest in self.older)
        return Undo(self.parts and mapped(self.parts), self.format, self.label, older)  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for parts in (self.parts or (), *(parts for parts, *_ in self.older)):
            yield from (part for part in parts if part is not None)

    def push(self, parts: Kept, fmt: QuantFormat, label: str = "") -> None:
        """Keep what an addition has replaced."""
        if self.parts is not None:
            self.older = (*self.older, (self.parts, self.format, self.label))[1 - _DEPTH :]
        self.parts, self.format, self.label = parts, fmt, label

    def pop(self) -> None:
        """Forget the last addition: it was taken back."""
        self.parts, self.format, self.label = self.older[-1] if self.older else (None, None, "")
        self.older = self.older[:-1]

    def clear(self) -> None:
        """Forget all: something else was written."""
        self.parts, self.format, self.label, self.older = None, None, "", ()


def replace(q: QuantizedTensor, merged: QuantizedTensor, label: str) -> None:
    """Put other bytes in the place of q's, of any format; ``take_back`` undoes it by its label."""
    with torch.inference_mode(False):  # what is made under it could never be trained on
        kept = tuple(None if part is None else part.clone() for part in q.parts)
    before = q.format
    take_parts(q, merged.parts, merged.format)
    q.undo.push(kept, before, label)


def take_back(q: QuantizedTensor, label: str) -> bool:
    """Put back what the addition of this label replaced, if it was the last write."""
    if q.undo.parts is None or q.undo.label != label:
        return False
    put_back(q)
    return True


def put_back(q: QuantizedTensor) -> None:
    """Put back what the last addition replaced."""
    parts, fmt = q.undo.parts or (), q.undo.format or q.format
    if fmt != q.format:  # they become its memory, and a clone of it keeps the same ones
        with torch.inference_mode(False):
            parts = tuple(None if part is None else part.clone() for part in parts)
    take_parts(q, parts, fmt)
    q.undo.pop()


def before_last_sum(q: QuantizedTensor) -> QuantizedTensor:
    """A copy of what the last addition was made to."""
    parts = [None if part is None else part.clone() for part in q.undo.parts or ()]
    return q.like(parts, fmt=q.undo.format)


def take_parts(q: QuantizedTensor, parts: Sequence[Tensor | None], fmt: QuantFormat) -> None:
    """Other parts for a tensor and its aliases.

    Into the same memory where the format is the same, as what shares it or knows it expects.
    """
    q.undo.writes += 1
    if fmt != q.format:
        q.undo.moved = tuple(parts), fmt
        _ = q.parts  # follows at once, its aliases when they are asked
        return
    for part, kept in zip(q.parts, parts, strict=True):
        if part is not None and kept is not None:
            part.copy_(kept)
