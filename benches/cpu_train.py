"""Forward and backward with LoRA, and what LoRA costs on top, for bench_cpu.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import limits
import torch
from cpu_engines import WrongResultError
from cpu_linear import TILED, TILES
from cpu_timing import (
    Effort,
    Engine,
    absent,
    add_ratios,
    interleaved,
    random_weight,
    relative_error,
)
from torch import Tensor, nn
from torch.nn import functional as F

import qkern

Row = dict[str, Any]
R = 16
TOLERANCE = 2e-2  # relative RMS error of bf16 outputs and gradients


class DenseLoRA(nn.Module):
    """An unquantized frozen layer with an adapter: what there is without quantizing."""

    def __init__(self, linear: nn.Module, out_features: int, in_features: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.empty(R, in_features, dtype=torch.bfloat16))
        self.lora_B = nn.Parameter(torch.empty(out_features, R, dtype=torch.bfloat16))
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        h = F.linear(x, self.lora_A).flatten(0, -2)
        flat = torch.addmm(y.flatten(0, -2), h, self.lora_B.mT, alpha=self.scaling)
        return flat.view_as(y)


def dense(w: Tensor) -> nn.Linear:
    """bf16, frozen."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.to(torch.bfloat16, copy=True), requires_grad=False)
    return layer


def with_qkern(w: Tensor, *, compute: str = "exact") -> nn.Module:
    """``QLoRALinear`` with a bf16 adapter."""
    return qkern.QLoRALinear.from_linear(
        dense(w), r=R, lora_alpha=2 * R, dtype=torch.bfloat16, compute=compute
    )


def with_bitsandbytes(w: Tensor) -> nn.Module:
    """``Linear4bit`` in training, nested, with the adapter of the unquantized layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4")
    return DenseLoRA(layer.to("cpu"), *w.shape)


MAKERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "torch bf16": lambda w: DenseLoRA(dense(w), *w.shape),
    "qkern": with_qkern,
    "qkern, int8 compute": partial(with_qkern, compute="int8"),
    "bitsandbytes train": with_bitsandbytes,
}


def weight_of(layer: Any) -> Tensor:
    """(N, K) fp32: what the layer multiplies."""
    inner = getattr(layer, "linear", layer)
    state = getattr(inner.weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional as bnb

        found: Tensor = bnb.dequantize_4bit(inner.weight.data, state)
        return found.float()
    if isinstance(layer, qkern.QLoRALinear):
        return layer.quantized_weight.dequantize(torch.float32)
    return inner.weight.float()


def fill_adapter(layer: Any) -> None:
    """The same values in every engine; B is not zero, or A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part.copy_(torch.randn(part.shape, generator=generator) * 0.02)


def step(layer: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """y, dX, dA, dB."""
    layer.lora_A.grad = layer.lora_B.grad = x.grad = None
    with torch.enable_grad():
        y = layer(x)
        y.backward(grad)
    return y, x.grad, layer.lora_A.grad, layer.lora_B.grad


def check(name: str, layer: Any, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Output and gradients against fp64; the errors of each.

    Raises:
        WrongResultError: if one is too far off.
    """
    found = step(layer, x, grad)
    w = weight_of(layer).double()
    A, B, xd, g = (t.detach().double() for t in (layer.lora_A, layer.lora_B, x, grad))
    h, s = xd @ A.mT, 2.0
    back = s * g @ B
    expected = (xd @ w.mT + s * h @ B.mT, g @ w + back @ A, back.mT @ xd, s * g.mT @ h)
    names = ("error", "error of dX", "error of dA", "error of dB")
    pairs = zip(names, found, expected, strict=True)
    errors = {key: relative_error(a.detach(), b) for key, a, b in pairs}
    tolerance = TOLERANCE if "int8" not in name else 5e-2
    if not all(error <= tolerance for error in errors.values()):
        msg = f"{name}: {errors}, at most {tolerance}"
        raise WrongResultError(msg)
    return errors


def clones(layer: Any, w: Tensor, effort: Effort) -> list[Any]:
    """As many layers as leave the caches."""
    quantized = getattr(layer, "linear", layer).weight.dtype == torch.uint8
    quantized = quantized or isinstance(layer, qkern.QuantizedLinear)
    nbytes = w.numel() // 2 if quantized else 2 * w.numel()
    return [layer, *(copy.deepcopy(layer) for _ in range(effort.copies(nbytes) - 1))]


def train(size: tuple[int, int], M: int, effort: Effort) -> Iterator[Row]:
    """Forward, dX and the adapter's gradients, beside an unquantized layer with the same LoRA."""
    w = random_weight(*size)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(M, size[1], generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(M, size[0], generator=generator).bfloat16()
    about = {"case": "forward and backward with LoRA", "dtype": "bf16", "M": M}
    about |= {"N": size[0], "K": size[1]}
    engines = []
    for name, make in MAKERS.items():
        try:
            layer = make(w)
            fill_adapter(layer)
            errors = check(name, layer, x, grad)
            copies = clones(layer, w, effort)
        except ImportError as error:
            yield absent(name, error, **about)
            continue
        engines.append(Engine(name, [partial(step, c, x, grad) for c in copies], errors))
    if limits.has_tiles():  # y and dX
        engines.append(Engine(TILES, [limits.multiplier(2 * M, *size)]))
    rows = interleaved(engines, effort.sustained())
    add_ratios(rows, "torch bf16", "times faster than torch bf16")
    bound = next((row["median"] for row in rows if row["engine"] == TILES), None)
    for row in rows:
        if bound is not None and row["engine"] in {"qkern", "torch bf16"}:
            row["share of tiles"] = bound / row["median"]
        yield about | row


def tokens(M: int, features: int) -> Tensor:
    """(M, features) in bf16."""
    return torch.randn(M, features, generator=torch.Generator().manual_seed(M)).bfloat16()


def lora(size: tuple[int, int], Ms: list[int], effort: Effort) -> Iterator[Row]:
    """The forward alone, with the adapter and without it."""
    w = random_weight(*size)
    quantized = qkern.QuantizedLinear.from_linear(dense(w))
    layers = {"qkern": quantized, "qkern with LoRA": with_qkern(w)}
    layers["qkern with LoRA, fp32 adapter"] = qkern.QLoRALinear.from_linear(dense(w), r=R)
    layers |= {"torch bf16": dense(w), "torch bf16 with LoRA": MAKERS["torch bf16"](w)}
    copies = {}
    for name, layer in layers.items():
        if "LoRA" in name:
            fill_adapter(layer)
        copies[name] = clones(layer, w, effort)
    for M in Ms:
        x = tokens(M, size[1])
        engines = [Engine(n, [partial(c, x) for c in made]) for n, made in copies.items()]
        rows = interleaved(engines, effort.sustained() if M >= TILED else effort)
        times = {row["engine"]: row["median"] for row in rows}
        for row in rows:
            base = row["engine"].partition(" with")[0]
            row["extra time"] = row["median"] / times[base] - 1
            yield {"case": "LoRA on top", "dtype": "bf16", "M": M, "N": size[0], "K": size[1]} | row
