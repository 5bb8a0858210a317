"""``qkern::projections``: ``qkern::linear`` of several layers that share x, such as q, k and v.

    forward    h = [s_i x A_i^T]                      fp32 (M, R), kept for backward
               y_i = x W_i^T + h_i B_i^T + bias_i     (M, N_i)
    backward   ``qkern::projections_backward``
               dX = sum of dY_i W_i + s_i dY_i B_i A_i
               dA_i = (s_i dY_i B_i)^T x, dB_i = dY_i^T h_i
               dbias_i = sum over M of dY_i

One launch for all y_i, and one for dX; x is saved once, and passes over it are for all adapters.
How each is computed: ``device_projections``, on devices with kernels alone. Others multiply by one
layer after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkern.formats import QuantFormat
from qkern.ops import device_projections
from qkern.ops.device import Adapter, Base
from qkern.ops.direct import is_unobserved, wants_grad
from qkern.ops.linear import linear
from qkern.ops.projections_backward import (
    ADAPTERS_SCHEMA,
    WEIGHTS_SCHEMA,
    adapters_of,
    bases_of,
    differentiable,
    projections_backward,
)
from qkern.reference import Parts


class Layer(NamedTuple):
    """What one layer multiplies and adds.

    Args:
        parts: of the weight, (out_features, in_features).
        fmt: how its bytes are read.
        out_features: rows of the weight.
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
    """

    parts: Parts
    fmt: QuantFormat
    out_features: int
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [t for t in (*self.parts, self.bias, self.lora_A, self.lora_B) if t is not None]


def share_a_launch(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether ``projections`` multiplies x by these layers in one launch."""
    dtype = _dtype_of(x)
    cast = dtype if dtype != x.dtype else None
    bases = [_base(layer, x.shape[-1]) for layer in layers]
    adapters = [_adapter(layer, cast) for layer in layers]
    return device_projections.serves(x, dtype, bases, adapters)


def projections(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """What ``linear`` returns for each layer; see there for autocast and dtypes.

    Args:
        x: (..., in_features).
        layers: of any kind; of one format, they share a launch where kernels serve.

    Returns:
        (..., out_features) each, in x's dtype, or in autocast's.
    """
    if not share_a_launch(x, layers):
        return [linear(x, *layer) for layer in layers]
    dtype = _dtype_of(x)
    cast = dtype if dtype != x.dtype else None
    x = x.to(dtype)
    biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]
    adapters = [_adapter(layer, cast) for layer in layers]
    A = [each.A for each in adapters if each is not None]
    B = [each.B for each in adapters if each is not None]
    each_part = zip(*(layer.parts for layer in layers), strict=True)
    parts = [[part for part in each if part is not None] for each in each_part]
    fmt = layers[0].fmt
    arguments: tuple[Any, ...] = (
        *(x, *parts, fmt.quant_type, fmt.blocksize, [layer.out_features for layer in layers]),
        *(biases, [i for i, layer in enumerate(layers) if layer.bias is not None]),
        *(A, B, [i for i, each in enumerate(adapters) if each is not None]),
        [each.scaling for each in adapters if each is not None],
    )
    tensors = (x, *biases, *A, *B)
    direct = is_unobserved(*tensors, *parts[0]) and not wants_grad(*tensors)
    outputs = (_forward if direct else _projections)(*arguments)
    return list(outputs[: len(layers)])


def _dtype_of(x: Tensor) -> torch.dtype:
    """That x is multiplied in: autocast's, if it is on."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _base(layer: Layer, in_features: int) -> Base:
    return Base(layer.parts, layer.fmt, (layer.out_features, in_features))


def _adapter(layer: Layer, cast: torch.dtype | None) -> Adapter | None:
    """The adapter of a layer, cast as autocast does."""
    A, B = layer.lora_A, layer.lora_B
    if A is None or B is None:
        return None
    return Adapter(A.to(cast), B.to(cast), layer.scaling) if cast else Adapter(A, B, layer.scaling)


def _forward(
    x: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    quant_type: str,
    blocksize: int,
    rows: Sequence[int],
    biases: Sequence[Tensor],
    biased: Sequence[int],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapted: Sequence[int],
    scalings: Sequence[float],
) -> list[Tensor]:
    """Each y_i (..., N_i), then h, fp32 (M, R).

    Args:
        x: (..., K).
        packed: of each layer, as the next three.
        absmax: likewise.
        nested_absmax: of each layer, or of none.
        offset: likewise.
        quant_type: of all.
        blocksize: of all.
        rows: out-features of each layer.
        biases: (N_i,) of the layers ``biased``, in x's dtype.
        biased: places of layers.
        lora_A: (r_i, K) of the layers ``adapted``.
        lora_B: (N_i, r_i) of the same.
        adapted: places of layers.
        scalings: of the same.
    """
    parts = (packed, absmax, nested_absmax, offset)
    bases = bases_of(parts, quant_type, blocksize, rows, x.shape[-1])
    own = dict(zip(biased, biases, strict=True))
    adapters = adapters_of(lora_A, lora_B, adapted, scalings, len(rows))
    bias_of = [own.get(i) for i in range(len(rows))]
    outputs, h = device_projections.forward(x, bases, bias_of, adapters)
    return [*outputs, h]


_projections = torch.library.custom_op(
    "qkern::projections",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, {WEIGHTS_SCHEMA}, Tensor[] biases, int[] biased, {ADAPTERS_SCHEMA})"
    " -> Tensor[]",
)


@_projections.register_fake
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    rows, lora_A = arguments[6], arguments[9]
    outputs = [x.new_empty((*x.shape[:-1], N)) for N in rows]
    ranks = sum(A.shape[0] for A in lora_A)
    return [*outputs, x.new_empty((math.prod(x.shape[:-1]), ranks), dtype=torch.float32)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *parts, quant_type, blocksize, rows, _, biased, A, B, adapted, scalings = inputs
    trains = any(factor.requires_grad for factor in (*A, *B))
    flat = [part for each in parts for part in each]
    ctx.save_for_backward(x if trains else None, output[-1] if trains else None, *flat, *A, *B)
    ctx.counts = [len(each) for each in (*parts, A, B)]
    ctx.format, ctx.rows, ctx.biased = (quant_type, blocksize), rows, biased
    ctx.adapted, ctx.scalings, ctx.in_features = adapted, scalings, x.shape[-1]
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)  # of h, and of outputs that were not used


def _backward(ctx: Any, outputs: list[Tensor | None]) -> tuple[Any, ...]:
    grads = {i: grad for i, grad in enumerate(outputs[:-1]) if grad is not None}
    needs_x, *_, needs_biases, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
    dX: Tensor | None = None
    factors: list[Tensor | None] = [None] * (2 * len(ctx.adapted))
    dbias = [
        grads[i].reshape(-1, grads[i].shape[-1]).sum(0) if needed and i in grads else None
        for i, needed in zip(ctx.biased, needs_biases, strict=True)
    ]
    needs = (needs_x, any(needs_A) or any(needs_B))
    if grads and any(needs):
        dX, *factors = _gradients_of(ctx, grads, needs)
        is_there = [needs[1] and i in grads for i in ctx.adapted] * 2
        factors = [t if there else None for t, there in zip(factors, is_there, strict=True)]
    half = len(ctx.adapted)
    nothing = [[None] * count for count in ctx.counts[:4]]
    # Torch takes an empty list of numbers for one of tensors.
    biased: list[Any] | None = None if ctx.biased else []
    adapted: list[Any] | None = None if ctx.adapted else []
    return (
        *(dX if needs_x and grads else None, *nothing, None, None, None, dbias, biased),
        *(factors[:half], factors[half:], adapted, adapted),
    )


def _gradients_of(
    ctx: Any, grads: dict[int, Tensor], needs: tuple[bool, bool]
) -> Sequence[Tensor | None]:
    """dX, then dA and dB of the layers ``adapted``."""
    x, h, *flat = ctx.saved_tensors
    rest = iter(flat)
    *parts, A, B = [[next(rest) for _ in range(count)] for count in ctx.counts]
    if torch.is_grad_enabled():  # gradients of gradients
        quant_type, blocksize = ctx.format
        bases = bases_of(parts, quant_type, blocksize, ctx.rows, ctx.in_features)
        adapters = adapters_of(A, B, ctx.adapted, ctx.scalings, len(bases))
        dX, factors = differentiable(grads, x, bases, adapters, needs)
        return [dX, *(factors[i][j] if i in factors else None for j in (0, 1) for i in ctx.adapted)]
    given = list(grads)
    found: list[Tensor] = projections_backward(
        *([grads[i] for i in given], given, x, h, *parts, *ctx.format, ctx.rows),
        *(A, B, ctx.adapted, ctx.scalings, ctx.in_features, needs),
    )
    return found


_projections.register_autograd(_backward, setup_context=_setup)
