"""``qkern::projections_backward``: gradients of layers that share x, see ``projections``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkern.formats import QuantFormat
from qkern.ops import device_projections
from qkern.ops.dequantize import FORMAT_SCHEMA
from qkern.ops.device import Adapter, Base
from qkern.ops.lora_gradients import add_product, lora_gradients
from qkern.reference import Parts

WEIGHTS_SCHEMA = (
    "Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] offset,"
    f" {FORMAT_SCHEMA}, int[] rows"
)
ADAPTERS_SCHEMA = "Tensor[] lora_A, Tensor[] lora_B, int[] adapted, float[] scalings"


def gradients(
    grads: Sequence[Tensor],
    given: Sequence[int],
    x: Tensor | None,
    h: Tensor | None,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    quant_type: str,
    blocksize: int,
    rows: Sequence[int],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapted: Sequence[int],
    scalings: Sequence[float],
    in_features: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dX, then dA_i and dB_i of the layers ``adapted``; (0,) in place of what is not there.

    Args:
        grads: dY_i (..., N_i) of the layers ``given``: what the others gave was not used.
        given: places of layers.
        x: (..., K), for the adapters' gradients.
        h: of ``qkern::projections``, for the same.
        packed: as there, and so are those up to ``scalings``.
        absmax: likewise.
        nested_absmax: likewise.
        offset: likewise.
        quant_type: likewise.
        blocksize: likewise.
        rows: likewise.
        lora_A: likewise.
        lora_B: likewise.
        adapted: likewise.
        scalings: likewise.
        in_features: K.
        needs: whether dX, and whether the adapters' gradients.
    """
    parts = (packed, absmax, nested_absmax, offset)
    bases = bases_of(parts, quant_type, blocksize, rows, in_features)
    adapters = adapters_of(lora_A, lora_B, adapted, scalings, len(rows))
    if h is not None and len(given) < len(rows):
        columns = torch.split(h, [A.shape[0] for A in lora_A], dim=1)
        used = [own for own, i in zip(columns, adapted, strict=True) if i in given]
        h = torch.cat(used, dim=1) if used else None
    needs_x, needs_factors = needs
    dX, dA, dB = device_projections.backward(
        grads,
        x,
        h,
        [bases[i] for i in given],
        [adapters[i] for i in given],
        (needs_x, needs_factors),
    )
    found: dict[int, tuple[Tensor | None, Tensor | None]]
    found = dict(zip(given, zip(dA, dB, strict=True), strict=True))
    factors = [found.get(i, (None, None))[j] for j in (0, 1) for i in adapted]
    return [grads[0].new_empty(0) if t is None else t for t in (dX, *factors)]


projections_backward = torch.library.custom_op(
    "qkern::projections_backward",
    gradients,
    mutates_args=(),
    schema=f"(Tensor[] grads, int[] given, Tensor? x, Tensor? h, {WEIGHTS_SCHEMA},"
    f" {ADAPTERS_SCHEMA}, int in_features, bool[2] needs) -> Tensor[]",
)


@projections_backward.register_fake
def _(grads: Sequence[Tensor], given: Sequence[int], *arguments: Any) -> list[Tensor]:
    lora_A, lora_B, adapted, _, in_features, (needs_x, needs_factors) = arguments[9:]
    grad = grads[0]
    dX = grad.new_empty((*grad.shape[:-1], in_features)) if needs_x else grad.new_empty(0)
    there = [needs_factors and i in given for i in adapted]
    pairs = [pair for factors in (lora_A, lora_B) for pair in zip(factors, there, strict=True)]
    return [dX, *(t.new_empty(t.shape) if has else grad.new_empty(0) for t, has in pairs)]


def bases_of(
    parts: Sequence[Sequence[Tensor]],
    quant_type: str,
    blocksize: int,
    rows: Sequence[int],
    in_features: int,
) -> list[Base]:
    """The weights, of their parts in lists; second-level scales of all or of none."""
    packed, absmax, nested, offset = parts
    fmt = QuantFormat(quant_type, blocksize, len(nested) > 0)
    nothing = [None] * len(rows)
    each = zip(packed, absmax, nested or nothing, offset or nothing, rows, strict=True)
    return [
        Base(Parts(*own), fmt, (N, in_features))  # type: ignore[arg-type]
        for *own, N in each
    ]


def adapters_of(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapted: Sequence[int],
    scalings: Sequence[float],
    count: int,
) -> list[Adapter | None]:
    """An adapter, or None, for each of ``count`` layers."""
    found = dict(zip(adapted, map(Adapter, lora_A, lora_B, scalings), strict=True))
    return [found.get(i) for i in range(count)]


def differentiable(
    grads: dict[int, Tensor],
    x: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, dict[int, tuple[Tensor, Tensor]]]:
    """dX, and dA and dB by place, by operators that have gradients: of one layer after the other.

    Args:
        grads: dY_i (..., N_i) by the layer's place.
        x: (..., K), for the adapters' gradients.
        bases: the weight of each layer.
        adapters: the adapter of each, or None.
        needs: whether dX, and whether the adapters' gradients.
    """
    dX: Tensor | None = None
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for i, grad in grads.items():
        (parts, fmt, (_, in_features)), adapter = bases[i], adapters[i]
        if needs[0]:
            kind = (fmt.quant_type, fmt.blocksize)
            own = torch.ops.qkern.linear_backward(grad, *parts, *kind, in_features)
            if adapter is not None:
                G = (grad.to(adapter.B.dtype) @ adapter.B) * adapter.scaling
                own = add_product(own, G, adapter.A)
            dX = own if dX is None else dX + own
        if needs[1] and adapter is not None and x is not None:
            factors[i] = lora_gradients(x, grad, *adapter[:3])
    return dX, factors
