"""Products of rows that are sorted by expert: expert after expert, or on a GPU in one launch.

    y_e = x_e W_e^T + s (x_e A_e^T) B_e^T + bias_e        x_e: the rows of expert e

Each expert is an ordinary weight in the same bytes, so each product is that of ``qkern::linear``,
or for weights that are stored (in, out) that of its backward, ``x W``. No dense copy of a weight is
made where those make none. A GPU's kernel takes no adapters: with them each expert has launches of
its own, and the host waits for the offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qkern import kernels, reference
from qkern.formats import QuantFormat
from qkern.ops import device, host
from qkern.ops.dequantize import parts_of_expert
from qkern.reference import Parts


class Stack(NamedTuple):
    """The frozen weights of all experts, each of whole blocks.

    Args:
        parts: of all of them.
        fmt: how the bytes are read.
        shape: (E, N, K), or (E, K, N) if ``transposed``.
        transposed: which of the two it is.
    """

    parts: Parts
    fmt: QuantFormat
    shape: tuple[int, int, int]
    transposed: bool

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape[2 if self.transposed else 1]

    def expert(self, index: int) -> tuple[Parts, QuantFormat]:
        """One of them."""
        return parts_of_expert(self.parts, self.fmt, self.shape[0], index)


class Adapters(NamedTuple):
    """A low-rank adapter for each expert: A (E, r, K), B (E, N, r), s."""

    A: Tensor
    B: Tensor
    scaling: float


def spans(offsets: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """``reference.spans`` of the experts that have any rows."""
    return (span for span in reference.spans(offsets, rows) if span[2] > span[1])


def multiply(
    x: Tensor, offsets: Tensor, stack: Stack, bias: Tensor | None, adapters: Adapters | None
) -> Tensor:
    """(M, N) in x's dtype, zeros behind the last offset.

    Args:
        x: (M, K).
        offsets: (E,) integers: where each expert's rows end.
        stack: the weights.
        bias: (E, N) in x's dtype, or None.
        adapters: what is added, or None.
    """
    if adapters is None and _has_kernel(x, stack):
        return _launch(x, offsets, stack, bias)
    y = torch.zeros((x.shape[0], stack.out_features), dtype=x.dtype, device=x.device)
    x = x.contiguous()
    one = _on_host if x.is_cpu else _on_device
    for expert, first, last in spans(offsets, x.shape[0]):
        of_expert = None if adapters is None else _of_expert(adapters, expert, stack.transposed)
        added = None if bias is None else bias[expert]
        one(x[first:last], stack, expert, added, of_expert, y[first:last])
    return y


def _has_kernel(x: Tensor, stack: Stack) -> bool:
    """Whether one launch multiplies all experts: on a GPU, as long as they have not many rows each.

    Those with many are multiplied one by one: of each, torch multiplies a dense copy.
    """
    if not kernels.is_supported(x.device) or x.shape[0] == 0:
        return False
    from qkern.kernels import launch
    from qkern.kernels.linear import config_for

    experts, rows, columns = stack.shape
    if not launch.fits(stack.fmt, (experts * rows, columns)):
        return False
    tokens = -(-x.shape[0] // experts)
    return config_for(x.device, x.dtype, tokens, rows, columns) is not None


def _launch(x: Tensor, offsets: Tensor, stack: Stack, bias: Tensor | None) -> Tensor:
    from qkern.kernels import launch
    from qkern.kernels.grouped import grouped

    experts, rows, columns = stack.shape
    weight = launch.weight(*stack.parts, stack.fmt, (experts * rows, columns))
    return grouped(x, offsets, weight, experts, bias, transposed=stack.transposed)


def _of_expert(adapters: Adapters, expert: int, transposed: bool) -> device.Adapter:  # noqa: FBT001
    """An expert's adapter, as the operation takes it that multiplies its weight.

    ``linear_backward`` adds ``s (x B) A``: A and B change places, each transposed.
    """
    A, B = adapters.A[expert], adapters.B[expert]
    if transposed:
        A, B = B.mT.contiguous(), A.mT.contiguous()
    return device.Adapter(A, B, adapters.scaling)


def _on_host(
    x: Tensor,
    stack: Stack,
    expert: int,
    bias: Tensor | None,
    adapter: device.Adapter | None,
    y: Tensor,
) -> None:
    """Write the rows of one expert, (m, N)."""
    parts, fmt = stack.expert(expert)
    A, B, scaling = (None, None, 1.0) if adapter is None else adapter[:3]
    if not stack.transposed:
        host.linear(x, parts, fmt, stack.out_features, bias, A, B, scaling, "exact", out=y)
        return
    host.linear_backward(x, parts, fmt, stack.out_features, A, B, scaling, out=y)
    if bias is not None:
        y += bias


def _on_device(
    x: Tensor,
    stack: Stack,
    expert: int,
    bias: Tensor | None,
    adapter: device.Adapter | None,
    y: Tensor,
) -> None:
    """The same elsewhere."""
    parts, fmt = stack.expert(expert)
    base = device.Base(parts, fmt, stack.shape[1:])
    if stack.transposed:
        found = (
            device.linear_backward(x, base) if adapter is None else device.grad_x(x, base, adapter)
        )
        found = found if bias is None else found + bias
    elif adapter is None:
        found = device.linear(x, base, bias)
    else:
        found = device.lora_linear(x, base, bias, adapter)[0]
    y.copy_(found)


def lora_gradients(
    x: Tensor, grad: Tensor, offsets: Tensor, adapters: Adapters
) -> tuple[Tensor, Tensor]:
    """Those of A (E, r, K) and B (E, N, r), by x (M, K) and dY (M, N); zeros without rows."""
    dA, dB = torch.zeros_like(adapters.A), torch.zeros_like(adapters.B)
    x, grad = x.contiguous(), grad.contiguous()
    for expert, first, last in spans(offsets, x.shape[0]):
        A, B = adapters.A[expert], adapters.B[expert]
        rows = (x[first:last], grad[first:last])
        if x.is_cpu:
            dA[expert], dB[expert] = host.lora_gradients(*rows, A, B, adapters.scaling)
        else:
            one = device.Adapter(A, B, adapters.scaling)
            dA[expert], dB[expert] = device.lora_gradients(*rows, one)
    return dA, dB


def sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """(E, N) in the rows' dtype: the sums of each expert's rows (M, N), in fp32, in a fixed order.

    What is not finite is so in its own expert alone.
    """
    if not rows.is_cpu:
        return _masked_sums(rows, offsets)
    found = rows.new_zeros((offsets.shape[0], rows.shape[1]), dtype=torch.float32)
    for expert, first, last in spans(offsets, rows.shape[0]):
        found[expert] = rows[first:last].sum(0, dtype=torch.float32)
    return found.to(rows.dtype)


def _masked_sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """The same by a product, for which the host does not wait for the offsets."""
    row = torch.arange(rows.shape[0], device=rows.device)
    before = row < offsets[:, None]  # (E, M): rows of this expert and of those before it
    mine = before & ~torch.nn.functional.pad(before, (0, 0, 1, 0))[:-1]
    wrong = ~rows.isfinite()  # times 0 they would be NaN in every expert
    found = mine.float() @ rows.float().masked_fill(wrong, 0.0)
    spoiled = (mine & wrong.any(1)).any(1)[:, None] & wrong.any(0)
    return found.masked_fill(spoiled, torch.nan).to(rows.dtype)
