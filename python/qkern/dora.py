"""DoRA: the rows of ``W + scaling B A`` keep their directions and get trained lengths.

    V = W + s B A                       (N, K)
    y = x ((m / |V|) * V)^T + bias      |V| the lengths of V's rows, (N,), constant for gradients

    |V|^2 = |W|^2 + 2 s sum_r B * (W A^T) + s^2 sum_r B * (B A A^T)

so that no dense weight is made at each step: ``|W|^2`` stays as long as W does, and ``W A^T`` is a
product with the packed weight of r rows.

Liu et al., https://arxiv.org/abs/2402.09353, in section 4.3 the constant.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from qkern.functional import linear
from qkern.lora_adapter import LoRAAdapter
from qkern.tensor import QuantizedTensor

# Values of a dense piece while the lengths of a weight's rows are measured: 64 MiB.
_PIECE = 2**24


@dataclasses.dataclass
class _Kept:
    """A result, what it was computed from, and the versions of that."""

    value: Tensor
    sources: tuple[weakref.ref[Tensor], ...]
    settings: tuple[float, ...]

    def is_of(self, sources: Sequence[Tensor], settings: tuple[float, ...]) -> bool:
        """Whether nothing has changed."""
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.settings == settings


class RowNorms:
    """Lengths of the rows of a layer's weight with an adapter, computed where they have changed.

    Those of the sum are kept in evaluation only, until ``forget``: what changes a parameter's
    ``data`` cannot be seen.
    """

    def __init__(self) -> None:
        self._base: _Kept | None = None
        self._sums: dict[int, _Kept] = {}

    def __reduce__(self) -> tuple[type[RowNorms], tuple[()]]:
        """A copy or a pickle begins anew."""
        return RowNorms, ()

    def forget(self) -> None:
        """Compute the lengths of sums again."""
        self._sums.clear()

    def of(self, weight: QuantizedTensor, adapter: LoRAAdapter, *, keep: bool = False) -> Tensor:
        """``|W + scaling B A|`` by row, fp32 (N,), without a gradient.

        Args:
            weight: W, (N, K).
            adapter: B A.
            keep: until the weight or the adapter changes.
        """
        sources = (weight.packed, adapter.lora_A, adapter.lora_B)
        settings: tuple[float, ...] = ()
        keep = keep and not torch.compiler.is_compiling()
        if keep:
            settings = (adapter.scaling, weight.undo.writes, *map(_version, sources[1:]))
            kept = self._sums.get(id(adapter))
            if kept is not None and kept.is_of(sources, settings):
                return kept.value
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            norms = row_norms(weight, adapter, self._squares(weight))
        if keep:
            self._sums[id(adapter)] = _Kept(norms, tuple(map(weakref.ref, sources)), settings)
        return norms

    def _squares(self, weight: QuantizedTensor) -> Tensor:
        if torch.compiler.is_compiling():
            return squared_norms(weight)
        packed = weight.packed
        settings = (weight.undo.writes,)
        if self._base is None or not self._base.is_of((packed,), settings):
            value = squared_norms(weight)
            self._base = _Kept(value, (weakref.ref(packed),), settings)
        return self._base.value


def row_norms(weight: QuantizedTensor, adapter: LoRAAdapter, squares: Tensor) -> Tensor:
    """``|W + scaling B A|`` by row, fp32 (N,).

    Args:
        weight: W, (N, K).
        adapter: B A.
        squares: ``|W|^2`` by row, fp32 (N,).
    """
    A, B = adapter.lora_A.detach().float(), adapter.lora_B.detach().float() * adapter.scaling
    cross = linear(A, weight)  # (r, N)
    sums = squares + 2 * (B * cross.mT).sum(1) + (B * (B @ (A @ A.mT))).sum(1)  # (N,)
    tiny = torch.finfo(torch.float32).tiny  # a row of zeros stays one
    return sums.clamp_min(tiny).sqrt()


def squared_norms(weight: QuantizedTensor) -> Tensor:
    """``|W|^2`` by row, fp32 (N,), of a piece of rows after the other."""
    rows, columns = weight.shape
    step = max(1, _PIECE // max(1, columns))
    if step >= rows or not weight.has_rows:
        return weight.dequantize(torch.float32).square().sum(1)
    pieces = (weight[start : start + step] for start in range(0, rows, step))
    return torch.cat([piece.dequantize().float().square().sum(1) for piece in pieces])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
