"""What in-place additions to a quantized tensor replaced, so that they can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

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
        label: what the adder calls its addition, to ask for ``take_back`` instead of subtracting.
        older: parts and label of the additions before the last one, where several adapters were
            merged; the latest is the last.
        writes: how often the tensor was written to: torch counts no writes into its parts.
    """

    parts: Kept | None = None
    label: str = ""
    older: tuple[tuple[Kept, str], ...] = ()
    writes: int = 0

    def map(self, fn: Callable[[Tensor], Tensor]) -> Undo:
        """The same on other parts, for a copy of the tensor."""

        def mapped(parts: Kept) -> Kept:
            return tuple(None if part is None else fn(part) for part in parts)

        older = tuple((mapped(parts), label) for parts, label in self.older)
        return Undo(self.parts and mapped(self.parts), self.label, older)

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for parts in (self.parts or (), *(parts for parts, _ in self.older)):
            yield from (part for part in parts if part is not None)

    def push(self, parts: Kept) -> None:
        """Keep what an addition has replaced."""
        if self.parts is not None:
            self.older = (*self.older, (self.parts, self.label))[1 - _DEPTH :]
        self.parts, self.label = parts, ""

    def pop(self) -> None:
        """Forget the last addition: it was taken back."""
        self.parts, self.label = self.older[-1] if self.older else (None, "")
        self.older = self.older[:-1]

    def clear(self) -> None:
        """Forget all: something else was written."""
        self.parts, self.label, self.older = None, "", ()
