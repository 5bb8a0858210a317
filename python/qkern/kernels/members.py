"""One of several layers in a launch: their operands are tuples, with an entry for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from qkern.errors import DTypeError, ShapeError
from qkern.kernels import launch
from qkern.kernels.launch import Weight


@triton.jit
def member_of(tile, rows, BN: tl.constexpr):
    """Which layer a tile of BN rows belongs to, the first of its rows there, rows of those before.

    ``rows`` is a tuple: of each layer. Its tiles come one after the other.
    """
    member = tile * 0
    first = tile * 0
    before = tile * 0
    tiles = tile * 0
    row = tile * 0
    for i in tl.static_range(1, len(rows)):
        tiles += (rows[i - 1] + BN - 1) // BN
        row += rows[i - 1]
        member = tl.where(tile >= tiles, i, member)
        first = tl.where(tile >= tiles, tiles, first)
        before = tl.where(tile >= tiles, row, before)
    return member, (tile - first) * BN, before


@triton.jit
def pick(values, member):
    """The entry of a tuple: pointers of one type, or numbers."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(member == i, values[i], chosen)
    return chosen


@triton.jit
def total(values):
    """The sum of a tuple's entries."""
    result = 0
    for i in tl.static_range(len(values)):
        result += values[i]
    return result


@triton.jit
def adapter_of(h_ptr, B, ranks, member):
    """Of one layer: where its columns of h begin, the length of h's rows, its B and its rank."""
    width = total(ranks)
    rank = pick(ranks, member)
    first = member * 0
    for i in tl.static_range(1, len(ranks)):
        first = tl.where(member >= i, first + ranks[i - 1], first)
    return h_ptr + first, width, pick(B, member), rank


def check_weights(weights: Sequence[Weight]) -> None:
    """Refuse weights that one launch cannot take together.

    Raises:
        ShapeError: unless they have the same in-features and format.
    """
    kinds = {(weight.in_features, weight.fmt) for weight in weights}
    if len(kinds) != 1:
        found = "; ".join(sorted(f"{K} in-features of {fmt.quant_type}" for K, fmt in kinds))
        msg = (
            f"weights of one launch must have the same in-features and format, got {found or None}"
        )
        raise ShapeError(msg)


def adapters(
    h: Tensor | None, lora_B: Sequence[Tensor | None], rows: Sequence[int], tokens: int
) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """Each B (N_i, r_i) as kernels take it, and the ranks, 0 for none.

    Raises:
        ShapeError: if one does not have its layer's ``rows``, or h not a column for each rank.
        DTypeError: for several dtypes, and those that kernels do not take.
    """
    if h is None:
        return [None] * len(rows), (0,) * len(rows)
    taken: list[Tensor | None] = []
    for B, N in zip(lora_B, rows, strict=True):
        taken.append(None if B is None else launch.operand(B, B.shape[-1], "lora_B"))
        if B is not None and B.shape[0] != N:
            msg = f"lora_B {tuple(B.shape)} must be (N, r) with N = {N}"
            raise ShapeError(msg)
    ranks = tuple(0 if B is None else B.shape[1] for B in taken)
    if h.shape != (tokens, sum(ranks)):
        msg = f"h {tuple(h.shape)} must be (M, R) with M = {tokens}, R = {sum(ranks)}"
        raise ShapeError(msg)
    dtypes = {B.dtype for B in taken if B is not None}
    if len(dtypes) > 1:
        msg = f"adapters of one launch must have one dtype, got {sorted(map(str, dtypes))}"
        raise DTypeError(msg)
    return taken, ranks


def filled(tensors: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, ...]:
    """``tensors``, with any of them, or ``other``, in place of those that are not there."""
    other = next((t for t in tensors if t is not None), other)
    return tuple(other if t is None else t for t in tensors)
