"""In which order a run sees its examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 16  # batches that are sorted together: enough to fill them well, few enough to stay random


class LengthGroupedOrder(Sampler[int]):
    """A random order in which the sequences of a batch have similar lengths.

    Padding is computed like text, so this saves what the longest sequence of a mixed batch costs.
    The order depends on seed and epoch alone, so a resumed run sees the same one. The longest
    sequence comes first in the first epoch: memory that does not suffice shows at once.

    Args:
        lengths: tokens of each example.
        batch: sequences of a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], *, batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self), generator=generator).tolist()
        pool = self._batch * _POOL
        batches: list[list[int]] = []
        for i in range(0, len(shuffled), pool):
            ordered = sorted(shuffled[i : i + pool], key=self._lengths.__getitem__, reverse=True)
            batches += [ordered[j : j + self._batch] for j in range(0, len(ordered), self._batch)]
        full = [batch for batch in batches if len(batch) == self._batch]
        rest = [batch for batch in batches if len(batch) != self._batch]  # one at most: the last
        order = torch.randperm(len(full), generator=generator).tolist()
        mixed = [full[i] for i in order] + rest
        if self._epoch == 0 and full:
            longest = max(full, key=lambda batch: self._lengths[batch[0]])
            mixed.remove(longest)
            mixed.insert(0, longest)
        return iter([i for batch in mixed for i in batch])
