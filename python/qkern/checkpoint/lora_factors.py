"""An adapter's factors, read when their weight's turn comes. No torch.

PEFT has the factors of E stacked experts as those of one layer of rank E r:

    A   (E r, in)     row e r + j is A[e, j]
    B   (out, r E)    column j E + e is B[e, :, j]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qkern.checkpoint.expert_weights import Part
from qkern.checkpoint.source import Source
from qkern.checkpoint.stream import Delta
from qkern.codec import F32

# Entries that are kept for the experts that come next: those of A and B of two weights, as files
# have gate, up and down of an expert beside each other.
_RECENT = 4


@dataclasses.dataclass(frozen=True)
class LoraFactors:
    """An adapter's part of a weight.

    Args:
        source: the adapter's file.
        keys: of A, (r, in), and B, (out, r).
        rank: r.
        scaling: of ``B A``.
        base: dtype that the base is rounded to.
        transposed: whether the weight is (in, out), as that of a Conv1D.
    """

    source: Source
    keys: tuple[str, str]
    rank: int
    scaling: float
    base: str
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Of both factors, in fp32."""
        return 4 * sum(self.source.tensors[key].numel for key in self.keys)

    def read(self) -> Delta:
        """The factors, with the scaling in the one of the rows."""
        A, B = (read_floats(self.source, key) for key in self.keys)
        scaling = np.float32(self.scaling)
        if self.transposed:
            rows, columns = np.ascontiguousarray(A.T) * scaling, np.ascontiguousarray(B.T)
        else:
            rows, columns = B * scaling, A
        return Delta(columns.reshape(-1), rows.reshape(-1), self.base)


class RecentEntries:
    """The entries of an adapter's file that were read last, as stored.

    Args:
        source: the file.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._held: dict[str, npt.NDArray[Any]] = {}

    def read(self, key: str) -> npt.NDArray[Any]:
        """An entry in its shape; bfloat16 as its bits."""
        found = self._held.pop(key, None)
        if found is None:
            while len(self._held) >= _RECENT:
                del self._held[next(iter(self._held))]
            found = _as_stored(self.source, key)
        self._held[key] = found
        return found


@dataclasses.dataclass(frozen=True)
class ExpertFactors:
    """An adapter's part of a tensor that holds experts, all of a weight or a part of one.

    Args:
        entries: of the adapter's file.
        keys: of A, (E r, in), and B, (out, r E).
        rank: r.
        scaling: of ``B A``.
        base: dtype that the base is rounded to.
        transposed: whether the tensor is (E, in, out).
        experts: E.
        part: which of the experts' rows the tensor holds.
    """

    entries: RecentEntries
    keys: tuple[str, str]
    rank: int
    scaling: float
    base: str
    transposed: bool
    experts: int
    part: Part

    @property
    def nbytes(self) -> int:
        """Of both factors, in fp32."""
        tensors, shape = self.entries.source.tensors, self.part.tensor.shape
        if self.part.expert is None:
            return 4 * sum(tensors[key].numel for key in self.keys)
        return 4 * self.rank * sum(shape)

    def read(self) -> Delta:
        """The factors, with the scaling in the one of the rows."""
        A, B = (self.entries.read(key) for key in self.keys)
        A = A.reshape(self.experts, self.rank, -1)  # (E, r, in)
        B = B.reshape(-1, self.rank, self.experts).transpose(2, 0, 1)  # (E, out, r)
        tensor, expert, first = self.part
        if expert is not None:
            A, B = A[expert : expert + 1], B[expert : expert + 1, first : first + tensor.shape[0]]
        rows, columns = (A.transpose(0, 2, 1), B.transpose(0, 2, 1)) if self.transposed else (B, A)
        dtypes = [self.entries.source.tensors[key].dtype for key in self.keys]
        of_rows, of_columns = dtypes if self.transposed else dtypes[::-1]
        scaled = _floats(rows, of_rows) * np.float32(self.scaling)
        return Delta(
            np.ascontiguousarray(_floats(columns, of_columns)).reshape(-1),
            np.ascontiguousarray(scaled).reshape(-1),
            self.base,
            matrices=len(A),
        )


def read_floats(source: Source, key: str) -> F32:
    """A dense tensor as fp32."""
    return _floats(_as_stored(source, key), source.tensors[key].dtype)


def _as_stored(source: Source, key: str) -> npt.NDArray[Any]:
    """A dense tensor; bfloat16 as its bits."""
    tensor = source.tensors[key]
    kind = {"bfloat16": "<u2", "float16": "<f2"}.get(tensor.dtype, "<f4")
    return source.read_bytes(key).view(kind).reshape(tensor.shape)


def _floats(stored: npt.NDArray[Any], dtype: str) -> F32:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
