"""Several layers of one input on a device with kernels: what ``device`` is to one layer.

    h   = [s_i x A_i^T]                          fp32 (M, R), one pass over x
    y_i = x W_i^T + h_i B_i^T + bias_i           one launch
    G_i = s_i dY_i B_i, dB_i = dY_i^T h_i        one pass over each dY_i
    dX  = sum of dY_i W_i + G A                  one launch, rounded once
    dA  = G^T x                                  one pass over x

R is the sum of the ranks; h, G and the rows of A have the adapters side by side. For more tokens
than kernels multiply, each weight is dequantized and multiplied by torch, and dX is added up in
place; what the adapters share stays shared.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern import kernels
from qkern.ops.dequantize import dense
from qkern.ops.device import Adapter, Base
from qkern.ops.tuning import tune_if_asked

if TYPE_CHECKING:
    from qkern.kernels.launch import Weight

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(
    x: Tensor, dtype: torch.dtype, bases: Sequence[Base], adapters: Sequence[Adapter | None]
) -> bool:
    """Whether one launch takes these layers, for any number of tokens.

    Args:
        x: the input; its device counts.
        dtype: that it is multiplied in.
        bases: the weights.
        adapters: an adapter each, or None.
    """
    if len(bases) < 2 or dtype not in _DTYPES or not kernels.is_supported(x.device):
        return False
    factors = {t.dtype for adapter in adapters if adapter is not None for t in adapter[:2]}
    if len(factors) > 1 or not factors <= set(_DTYPES):
        return False
    from qkern.kernels import launch

    kinds = {(base.fmt, base.parts.nested_absmax is None, base.shape[1]) for base in bases}
    if not launch.TAKES_TUPLES or len(kinds) > 1:
        return False
    return all(launch.fits(base.fmt, base.shape) for base in bases)


def forward(
    x: Tensor,
    bases: Sequence[Base],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Adapter | None],
) -> tuple[list[Tensor], Tensor]:
    """Each y_i (..., N_i), in memory of its own, and h.

    Args:
        x: (..., K).
        bases: weights (N_i, K) for which ``serves`` holds.
        biases: (N_i,) in x's dtype, or None, each.
        adapters: an adapter each, or None; no dropout, not merged.
    """
    from qkern.kernels.launch import operand
    from qkern.kernels.lora import hidden
    from qkern.kernels.projections import projections

    rows = operand(x, x.shape[-1], "x")
    h = rows.new_empty((rows.shape[0], 0), dtype=torch.float32)
    if any(adapter is not None for adapter in adapters):
        h = hidden(rows, _side_by_side(adapters), _scalings(adapters, x.device))
    if _are_packed(rows, bases):
        lora_B = [None if adapter is None else adapter.B for adapter in adapters]
        return projections(x, _weights(bases), biases, h if h.shape[1] else None, lora_B), h
    outputs = []
    for base, bias, adapter, own in zip(
        bases, biases, adapters, _columns(h, adapters), strict=True
    ):
        weight = dense(base.parts, base.fmt, base.shape, x.dtype)
        y = torch.nn.functional.linear(rows, weight, bias)
        if adapter is not None and own is not None:
            y = _add_adapter(y, own, adapter.B.mT)
        outputs.append(y.reshape(*x.shape[:-1], base.shape[0]))
    return outputs, h


def backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """DX (..., K), and dA (r_i, K) and dB (N_i, r_i) of each adapter, or None.

    Args:
        grads: dY_i (..., N_i).
        x: (..., K), for the adapters' gradients.
        h: fp32 (M, R): the columns of these adapters, for the same.
        bases: the weights.
        adapters: an adapter each, or None.
        needs: whether dX, and whether the adapters' gradients.
    """
    from qkern.kernels.launch import operand
    from qkern.kernels.lora import hidden
    from qkern.kernels.lora_backward import grad_a, grad_hidden

    needs_x, needs_factors = needs
    rows = [operand(g, g.shape[-1], "grad") for g in grads]
    taken = [adapter for adapter in adapters if adapter is not None]
    G: list[Tensor] = []
    dA: list[Tensor | None] = [None] * len(rows)
    dB: list[Tensor | None] = []
    own = [None] * len(rows) if h is None else _columns(h, adapters)
    for grad, adapter, h_i in zip(rows, adapters, own, strict=True):
        if adapter is None:
            dB.append(None)
        elif needs_factors and h_i is not None:
            B = operand(adapter.B, adapter.B.shape[1], "lora_B")
            G_i, dB_i = grad_hidden(grad, B, h_i, adapter.scaling)
            G.append(G_i)
            dB.append(dB_i)
        else:
            G.append(hidden(grad, adapter.B.mT.contiguous(), adapter.scaling))
            dB.append(None)
    all_G = torch.cat(G, dim=1) if G else None
    dX = None
    if needs_x:
        all_A = _side_by_side(adapters) if taken else None
        dX = _grad_x(rows, bases, all_G, all_A).reshape(*grads[0].shape[:-1], bases[0].shape[1])
    if needs_factors and x is not None and all_G is not None:
        together = grad_a(all_G, operand(x, x.shape[-1], "x"), taken[0].A.dtype)
        split = iter(torch.split(together, [adapter.A.shape[0] for adapter in taken]))
        # Of its own: else the gradient of one would keep the memory of all.
        dA = [None if adapter is None else next(split).clone() for adapter in adapters]
    return dX, dA, dB


def _grad_x(
    rows: Sequence[Tensor], bases: Sequence[Base], G: Tensor | None, A: Tensor | None
) -> Tensor:
    """``sum of dY_i W_i + G A``, (M, K)."""
    if _are_packed(rows[0], bases):
        from qkern.kernels.projections_backward import projections_backward

        return projections_backward(rows, _weights(bases), G, A)
    dX = None
    for grad, base in zip(rows, bases, strict=True):
        weight = dense(base.parts, base.fmt, base.shape, grad.dtype)
        dX = grad @ weight if dX is None else dX.addmm_(grad, weight)
    assert dX is not None
    return dX if G is None or A is None else _add_adapter(dX, G, A)


def _are_packed(rows: Tensor, bases: Sequence[Base]) -> bool:
    """Whether kernels multiply the packed weights for so many tokens."""
    from qkern.kernels.linear import config_for

    N, K = sum(base.shape[0] for base in bases), bases[0].shape[1]
    tune_if_asked(rows.device, rows.dtype, rows.shape[0], (N, K))
    return config_for(rows.device, rows.dtype, rows.shape[0], N, K) is not None


def _weights(bases: Sequence[Base]) -> list[Weight]:
    from qkern.kernels import launch

    return [launch.weight(*base.parts, base.fmt, base.shape) for base in bases]


def _side_by_side(adapters: Sequence[Adapter | None]) -> Tensor:
    """The rows of all A, (R, K), contiguous."""
    return torch.cat([adapter.A for adapter in adapters if adapter is not None])


def _scalings(adapters: Sequence[Adapter | None], device: torch.device) -> float | Tensor:
    """One number, or fp32 (R,): one for each column of h."""
    each = [(a.scaling, a.A.shape[0]) for a in adapters if a is not None]
    if len({scaling for scaling, _ in each}) == 1:
        return each[0][0]
    return _by_column(tuple(each), device)


@functools.lru_cache(maxsize=1024)
def _by_column(each: tuple[tuple[float, int], ...], device: torch.device) -> Tensor:
    """Kept: to copy it to the device again would wait, and is refused in a CUDA graph."""
    values = [scaling for scaling, rank in each for _ in range(rank)]
    make = functools.partial(torch.tensor, values, dtype=torch.float32, device=device)
    return kernels.lasting(device, make)


def _columns(h: Tensor, adapters: Sequence[Adapter | None]) -> list[Tensor | None]:
    """The columns of h of each adapter, contiguous."""
    ranks = [adapter.A.shape[0] for adapter in adapters if adapter is not None]
    split = iter(torch.split(h, ranks, dim=1))
    return [None if adapter is None else next(split).contiguous() for adapter in adapters]


def _add_adapter(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """``y + h B``, (M, N), h (M, r), B (r, N); y is overwritten."""
    from qkern.kernels.add_adapter import add_adapter
    from qkern.kernels.launch import operand

    return add_adapter(y, h, operand(B, B.shape[1], "an adapter's factor"))
