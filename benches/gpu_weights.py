"""Frozen weights on the device, as each package keeps them, in copies that leave the caches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_device import random
from gpu_plan import Plan, Shape
from torch import Tensor
from torch.nn import functional as F

import qkern
from qkern.tensor import QuantizedTensor

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight, with 8-bit scales


@functools.cache
def bitsandbytes() -> Any:
    """Its package.

    Raises:
        ImportError: with its own reason, if it cannot be had.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    return bnb


def values(shape: Shape, device: torch.device) -> Tensor:
    """Gaussian fp32, as of a linear layer."""
    return random(*shape, device=device) * 0.02


def quantized(w: Tensor, plan: Plan) -> list[QuantizedTensor]:
    """qkern's copies: blocks of 64, 8-bit scales."""
    first = qkern.quantize(w)
    more = plan.effort.copies(first.nbytes) - 1
    return [first, *(_copied(first) for _ in range(more))]


def _copied(q: QuantizedTensor) -> QuantizedTensor:
    return q.like([None if part is None else part.clone() for part in q.parts])


def random_quantized(shape: Shape, device: torch.device) -> QuantizedTensor:
    """Codes and scales that no kernel made: to compile with."""
    from qkern.formats import QuantFormat
    from qkern.reference import Parts

    fmt, numel = QuantFormat("nf4", 64), shape[0] * shape[1]

    def codes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)

    nested = torch.rand(fmt.num_nested(numel), device=device) * 0.01
    parts = Parts(
        codes(fmt.packed_size(numel)),
        codes(fmt.num_blocks(numel)),
        nested,
        torch.full((1,), 0.05, device=device),
    )
    return QuantizedTensor.from_parts(parts, fmt, shape, torch.bfloat16)


def dense_copies(w: Tensor, plan: Plan) -> list[Tensor]:
    """bf16."""
    return [w.to(torch.bfloat16, copy=True) for _ in range(plan.effort.copies(2 * w.numel()))]


@dataclass
class Theirs:
    """A weight of bitsandbytes: NF4, blocks of 64, nested."""

    packed: Tensor
    state: Any

    @classmethod
    def of(cls, w: Tensor) -> Theirs:
        """Quantized by its own code; it decodes to w's dtype."""
        settings = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        return cls(*bitsandbytes().functional.quantize_4bit(w, **settings))

    def dense(self) -> Tensor:
        """(N, K), by its own code, in fresh memory."""
        found: Tensor = bitsandbytes().functional.dequantize_4bit(self.packed, self.state)
        return found

    def copy(self) -> Theirs:
        """Codes and scales of its own."""
        import copy

        state = copy.copy(self.state)
        state.absmax = self.state.absmax.clone()
        return Theirs(self.packed.clone(), state)


def their_copies(w: Tensor, plan: Plan) -> list[Theirs]:
    """As many as of qkern's; they decode to bf16."""
    first = Theirs.of(w.bfloat16())
    more = plan.effort.copies(int(w.numel() * NF4_BYTES)) - 1
    return [first, *(first.copy() for _ in range(more))]


class Workspace:
    """Buffers that all layers share, in the manner of Unsloth: scales, then a dense weight.

    Its sequence of calls, written anew over bitsandbytes' operators: scales to fp32, their offset,
    values to bf16, then products of torch. For one token bitsandbytes' product of a vector.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        """``largest``: values of the largest weight."""
        self.absmax = torch.empty(largest // 64, dtype=torch.float32, device=device)
        self.dense = torch.empty(largest, dtype=torch.bfloat16, device=device)

    def scales(self, weight: Theirs) -> Tensor:
        """fp32 scales, in the buffer."""
        state, state2 = weight.state, weight.state.state2
        out = self.absmax[: state.absmax.numel()]
        operator = torch.ops.bitsandbytes.dequantize_blockwise
        arguments = (state.absmax, state2.absmax, state2.code, state2.blocksize, torch.float32)
        _call_into(operator, arguments, out)
        out += state.offset
        return out

    def dequantize(self, weight: Theirs) -> Tensor:
        """(N, K) bf16, in the buffer."""
        state = weight.state
        out = self.dense[: state.shape.numel()].view(state.shape)
        scales = self.scales(weight)
        operator = torch.ops.bitsandbytes.dequantize_4bit
        kind = (state.blocksize, state.quant_type, state.shape, torch.bfloat16)
        _call_into(operator, (weight.packed, scales, *kind), out)
        return out

    def linear(self, weight: Theirs, x: Tensor) -> Tensor:
        """``x W^T`` of tokens (M, K)."""
        if x.shape[0] > 1 or x.is_cpu:  # there bitsandbytes' vectors need weights of another layout
            return torch.matmul(x, self.dequantize(weight).t())
        state = weight.state
        arguments = (x, weight.packed, state.shape, self.scales(weight), state.code)
        found: Tensor = torch.ops.bitsandbytes.gemv_4bit(*arguments, state.blocksize)
        return found


def _call_into(operator: Any, arguments: tuple[Any, ...], out: Tensor) -> None:
    """The variant that writes into ``out``, which bitsandbytes has for GPUs alone."""
    if out.is_cpu:
        out.copy_(operator.default(*arguments).view(out.shape))
    else:
        operator.out(*arguments, out=out)


@dataclass
class Linear:
    """One package's way to ``y = x W^T`` without gradients.

    Attributes:
        name: in the results.
        weights: one for each copy.
        call: (weight, x) to y.
        dense: (N, K), the weight that the last copy stands for.
        tokens: the numbers of rows of x that it is measured with.
    """

    name: str
    weights: list[Any]
    call: Callable[[Any, Tensor], Tensor]
    dense: Callable[[], Tensor]
    tokens: range = range(1, 1 << 30)


def of_qkern(w: Tensor, plan: Plan) -> list[Linear]:
    """The operator; and its parts by themselves: one kernel that decodes, then torch's product."""
    from qkern.kernels.dequantize import dequantize

    copies = quantized(w, plan)
    workspace = torch.empty(w.numel(), dtype=torch.bfloat16, device=w.device)

    def by_dequantizing(q: QuantizedTensor, x: Tensor) -> Tensor:
        dequantize(*q.parts, q.format, w.numel(), torch.bfloat16, workspace)
        return F.linear(x, workspace.view(w.shape))

    def dense() -> Tensor:
        return copies[-1].dequantize(torch.float32)

    above = range(1 if plan.quick else 32, 1 << 30)
    return [
        Linear("qkern", copies, lambda q, x: qkern.linear(x, q), dense),
        Linear("qkern dequantize + torch", copies, by_dequantizing, dense, above),
    ]


def of_torch(w: Tensor, plan: Plan) -> list[Linear]:
    """The unquantized weight, by cuBLAS."""
    copies = dense_copies(w, plan)
    return [Linear("torch bf16", copies, lambda d, x: F.linear(x, d), copies[-1].float)]


def of_bitsandbytes(w: Tensor, plan: Plan) -> list[Linear]:
    """Its operator, its two steps, and those in the manner of Unsloth."""
    bnb, copies = bitsandbytes(), their_copies(w, plan)
    workspace = Workspace(w.device, w.numel())

    def dense() -> Tensor:
        return copies[-1].dense().float()

    ways: dict[str, Callable[[Theirs, Tensor], Tensor]] = {
        "bitsandbytes gemm_4bit": lambda q, x: bnb.matmul_4bit(x, q.packed, q.state),
        "bitsandbytes dequantize + linear": lambda q, x: F.linear(x, q.dense()),
        "Unsloth sequence": workspace.linear,
    }
    return [Linear(name, copies, call, dense) for name, call in ways.items()]
