"""``h = s dropout(x) A^T`` of all adapters that read x, in one pass over it.

    h (M, R) fp32,  x (M, K),  A (R, K),  s a number or one for each column of h

Adapters lie side by side: R is the sum of their ranks, any number. That serves the projections of
a block that share x, and several adapters in a batch: with ``Rows`` token m keeps the columns of
its own adapter, the others are 0, and so is all that is computed from them (y, dA, dB).

Few tokens take a program for each value of h. Else tiles (BM, BR) on tensor cores, with columns of
x split between programs where there are few tiles; the parts are added in their order by a second
kernel. No sum depends on when a program runs: reruns have the same bits. Factors of different
dtypes: see ``thin_product``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels.aot import AotSpec
from qkern.kernels.dropout import Dropout, arguments, gain_of, keep
from qkern.kernels.launch import EXACT, FUSED, TL_DTYPES, processors, same_device
from qkern.kernels.rounding import round_to, widen
from qkern.kernels.thin_product import multiply_thin, precision, precision_of

# Tokens up to which each value of h is a program of its own.
FEW = 4
# Columns of a rank tile at most: more would not fit into registers beside their sums.
RANK_TILE = 64


class Rows(NamedTuple):
    """Which adapter each token has, of several side by side.

    Args:
        adapter: int32 (M,), from 0; negative for none.
        rank: of each adapter.
    """

    adapter: Tensor
    rank: int


@triton.jit
def _own_columns(
    values,  # (BM, BR)
    adapter_ptr,
    m,
    rank,
    M,
    EACH: tl.constexpr,
):
    """``values`` of the columns ``rank`` of the row's own adapter, else 0; EACH 0: all are."""
    if EACH == 0:
        return values
    else:
        adapter = tl.load(adapter_ptr + m, mask=m < M, other=-1)  # (BM,)
        return tl.where(adapter[:, None] == (rank // EACH)[None, :], values, 0.0)


@triton.jit
def _hidden_kernel(
    x_ptr,
    A_ptr,
    adapter_ptr,
    scales_ptr,
    seed_ptr,
    out_ptr,
    M,
    K,
    split,
    threshold,
    scaling,
    RANK: tl.constexpr,
    EACH: tl.constexpr,
    SCALES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # (BM,)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)  # (BR,)
    column = tl.arange(0, BK)
    part = tl.program_id(2)
    x_row = x_ptr + m.to(tl.int64)[:, None] * K  # (BM, 1)
    A_row = A_ptr + rank.to(tl.int64)[:, None] * K  # (BR, 1)
    sums = tl.full([BM, BR], 0.0, tl.float32)
    for k in range(part * split, tl.minimum(part * split + split, K), BK):
        inside = (k + column < K)[None, :]
        x = tl.load(x_row + (k + column)[None, :], mask=(m < M)[:, None] & inside, other=0.0)
        A = tl.load(A_row + (k + column)[None, :], mask=(rank < RANK)[:, None] & inside, other=0.0)
        if DROPOUT:
            kept = keep(tl.load(seed_ptr), m, k, K, threshold, BK)
            x = tl.where(kept, x, tl.zeros_like(x))
        sums = multiply_thin(x, tl.trans(A), sums, PRECISION)
    if SCALES:
        scaling *= tl.load(scales_ptr + rank, mask=rank < RANK, other=0.0)[None, :]
    h = _own_columns(sums * scaling, adapter_ptr, m, rank, M, EACH)
    at = (part.to(tl.int64) * M + m)[:, None] * RANK + rank[None, :]  # (BM, BR)
    tl.store(out_ptr + at, h, mask=(m < M)[:, None] & (rank < RANK)[None, :])


@triton.jit
def _hidden_few_kernel(
    x_ptr,
    A_ptr,
    adapter_ptr,
    scales_ptr,
    out_ptr,
    K,
    scaling,
    RANK: tl.constexpr,
    EACH: tl.constexpr,
    SCALES: tl.constexpr,
    BK: tl.constexpr,
):
    rank = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BK)
    last = K
    if EACH > 0:  # another's column is 0 without a look at x
        last = tl.where(tl.load(adapter_ptr + m) == rank // EACH, K, 0)
    sums = tl.full([BK], 0.0, tl.float32)
    for k in range(0, last, BK):
        inside = k + column < K
        x = tl.load(x_ptr + m * K + k + column, mask=inside, other=0.0)
        A = tl.load(A_ptr + rank.to(tl.int64) * K + k + column, mask=inside, other=0.0)
        sums += widen(x) * widen(A)
    if SCALES:
        scaling *= tl.load(scales_ptr + rank)
    tl.store(out_ptr + m * RANK + rank, tl.sum(sums, axis=0) * scaling)


@triton.jit
def _add_parts_kernel(
    parts_ptr,
    adapter_ptr,
    scales_ptr,
    out_ptr,
    count,
    numel,
    scaling,
    RANK: tl.constexpr,
    EACH: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = at < numel
    total = tl.full([BLOCK], 0.0, tl.float32)
    for part in range(count):
        place = parts_ptr + tl.cast(part, tl.int64) * numel + at
        total += tl.load(place, mask=inside, other=0.0)
    rank = (at % RANK).to(tl.int32)
    if SCALES:
        scaling *= tl.load(scales_ptr + rank)
    total *= scaling
    if EACH > 0:
        adapter = tl.load(adapter_ptr + at // RANK, mask=inside, other=-1)
        total = tl.where(adapter == rank // EACH, total, 0.0)
    tl.store(out_ptr + at, round_to(total, out_ptr.dtype.element_ty), mask=inside)


def hidden(
    x: Tensor,
    A: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    rows: Rows | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """``s dropout(x) A^T``, fp32 (M, R).

    Args:
        x: (M, K), contiguous: fp32, fp16 or bf16.
        A: (R, K), contiguous: any of these dtypes.
        scaling: s, or fp32 (R,), one for each column.
        rows: the adapter of each token, if there are several.
        dropout: of x, for the adapters alone.
    """
    same_device(x, A)
    M, K = x.shape
    R = A.shape[0]
    h = torch.empty((M, R), dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h
    common, factor = _scaling_and_rows(scaling, rows, h, dropout)
    dropped = arguments(dropout, h)
    with torch.cuda.device_of(x):
        if M <= FEW and not dropped["DROPOUT"]:
            block = min(max(triton.next_power_of_2(K), 16), 1024)
            _hidden_few_kernel[(R, M)](
                x, A, out_ptr=h, K=K, scaling=factor, RANK=R, BK=block, **common, **FUSED
            )
            return h
        tile = tile_of(R, x.dtype, dropped=dropped["DROPOUT"])
        BM, BR, BK = (tile[name] for name in ("BM", "BR", "BK"))
        tiles = (triton.cdiv(M, BM), triton.cdiv(R, BR))
        split = split_of(K, BK, tiles[0] * tiles[1], x.device)
        parts = triton.cdiv(K, split)
        whole = parts == 1
        out = h if whole else torch.empty((parts, M, R), dtype=torch.float32, device=x.device)
        _hidden_kernel[(*tiles, parts)](
            x,
            A,
            out_ptr=out,
            M=M,
            K=K,
            split=split,
            scaling=factor if whole else 1.0,
            RANK=R,
            PRECISION=precision(x.device),
            **dropped,
            **tile,
            **FUSED,
            **(common if whole else {**common, "EACH": 0, "SCALES": False}),
        )
        if not whole:
            add_parts(out, h, scaling, rows=rows, dropout=dropout)
    return h


def add_parts(
    parts: Tensor,
    out: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    rows: Rows | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Write the sum of ``parts``, in their order, times ``scaling`` into ``out``.

    Args:
        parts: fp32 (P, ...), contiguous.
        out: (..., R), contiguous, any dtype.
        scaling: s, or fp32 (R,).
        rows: zeroes the columns of other tokens' adapters.
        dropout: multiplies by what its kept values are multiplied by.
    """
    common, factor = _scaling_and_rows(scaling, rows, out, dropout)
    _add_parts_kernel[(triton.cdiv(out.numel(), 1024),)](
        parts,
        out_ptr=out,
        count=parts.shape[0],
        numel=out.numel(),
        scaling=factor,
        RANK=out.shape[-1] if common["EACH"] or common["SCALES"] else 1,
        BLOCK=1024,
        **common,
        **EXACT,
    )


def _scaling_and_rows(
    scaling: float | Tensor, rows: Rows | None, other: Tensor, dropout: Dropout | None
) -> tuple[dict[str, Any], float]:
    """What kernels take for both, and the factor that is a number; ``other`` is any tensor."""
    by_column = isinstance(scaling, Tensor)
    factor = 1.0 if by_column else float(scaling)
    if dropout is not None:
        factor *= gain_of(dropout.p)
    arguments = {
        "adapter_ptr": other if rows is None else rows.adapter,
        "scales_ptr": scaling if by_column else other,
        "EACH": 0 if rows is None else rows.rank,
        "SCALES": by_column,
    }
    return arguments, factor


def tile_of(R: int, dtype: torch.dtype, *, dropped: bool = False) -> dict[str, int]:
    """BM, BR and BK for a product of x (M, K) with R rows."""
    BR = min(max(triton.next_power_of_2(R), 16), RANK_TILE)
    BK = 64
    if dtype == torch.float32:  # three products of each tile: as many registers as there are
        BK = 16 if BR == RANK_TILE else 32
    # Values that come from registers, as those that dropout chose, make wgmma wait: no tile for it.
    return {"BM": 32 if dropped else 64, "BR": BR, "BK": BK}


def split_of(length: int, step: int, tiles: int, device: torch.device) -> int:
    """How much of ``length`` a program sums, a multiple of ``step``: four programs a processor."""
    wanted = max(4 * processors(device) // tiles, 1)
    return int(triton.cdiv(triton.cdiv(length, wanted), step) * step)


def name_of(dtype: torch.dtype) -> str:
    """Triton's name, "bf16" for one."""
    return str(TL_DTYPES[dtype].name)


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to values of a dtype."""
    return f"*{name_of(dtype)}"


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """The product in bf16, fp16 and fp32, without options and with all of them."""
    common = {"adapter_ptr": "*i32", "scales_ptr": "*fp32", "out_ptr": "*fp32", "scaling": "fp32"}
    plain = {"EACH": 0, "SCALES": False}
    for dtype, adapter, R, everything in (
        (torch.bfloat16, torch.float32, 16, False),
        (torch.bfloat16, torch.bfloat16, 64, True),
        (torch.float16, torch.float32, 64, True),
        (torch.float32, torch.float32, 64, False),
    ):
        pointers = {"x_ptr": pointer_to(dtype), "A_ptr": pointer_to(adapter), "seed_ptr": "*i64"}
        sizes = {"M": "i32", "K": "i32", "split": "i32", "threshold": "i32"}
        options = "all options" if everything else "no options"
        own = {"EACH": R // 2, "SCALES": True} if everything else plain
        tile = tile_of(R, dtype, dropped=everything)
        constants = {"RANK": R, **own, "DROPOUT": everything, **tile}
        yield AotSpec(
            f"lora hidden r{R} of {name_of(dtype)}, A {name_of(adapter)}, {options}",
            _hidden_kernel,
            common | pointers | sizes,
            constants | {"PRECISION": precision_of(arch)},
            divisible=("K", "split"),
            exact=False,
            tensor_cores=True,
        )
    few = {"x_ptr": "*bf16", "A_ptr": "*fp32", "K": "i32"}
    constants = {"RANK": 16, "BK": 1024, **plain}
    yield AotSpec(
        "lora hidden of few",
        _hidden_few_kernel,
        common | few,
        constants,
        divisible=("K",),
        exact=False,
    )
    parts = {"parts_ptr": "*fp32", "count": "i32", "numel": "i64"}
    constants = {"RANK": 16, "BLOCK": 1024, **plain}
    yield AotSpec("lora add parts", _add_parts_kernel, common | parts, constants)
