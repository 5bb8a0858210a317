"""Layers with an adapter, as each package trains them: for gpu_train.py and gpu_model.py.

Adapters are bf16 everywhere, rank ``R``, scaled by 2.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from gpu_plan import R
from gpu_weights import Theirs, Workspace, bitsandbytes
from torch import Tensor, nn
from torch.nn import functional as F

import qkern

SCALING = 2.0
BF16 = torch.bfloat16


def dense(w: Tensor) -> nn.Linear:
    """bf16, frozen, its memory its own."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.to(BF16, copy=True), requires_grad=False)
    return layer


class Adapter(nn.Module):
    """A and B; what they are added to is the subclass's."""

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(R, in_features, dtype=BF16, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, R, dtype=BF16, device=device))


class DenseLoRA(Adapter):
    """The unquantized layer with an adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.out_features, linear.in_features, linear.weight.device)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        y = self.linear(x)
        h = F.linear(x, self.lora_A).flatten(0, -2)
        flat = torch.addmm(y.flatten(0, -2), h, self.lora_B.mT, alpha=SCALING)
        return flat.view_as(y)


class _Sequence(torch.autograd.Function):
    """The calls of Unsloth's layer: the weight once for forward and once more for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Theirs, workspace: Workspace
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = workspace.linear(weight, flat)
        y.addmm_(flat @ A.t(), B.t(), alpha=SCALING)
        ctx.save_for_backward(flat, A, B)
        ctx.weight, ctx.workspace, ctx.shape = weight, workspace, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, A, B = ctx.saved_tensors
        dY = grads[0].reshape(-1, grads[0].shape[-1])
        dA, dB = torch.empty_like(A), torch.empty_like(B)
        dA.addmm_((dY @ B).t(), x, alpha=SCALING, beta=0)
        dB.addmm_(dY.t(), x @ A.t(), alpha=SCALING, beta=0)
        dX = dY @ ctx.workspace.dequantize(ctx.weight)
        dX.addmm_(dY @ B, A, alpha=SCALING)
        return dX.view(ctx.shape), dA, dB, None, None


class SequenceLinear(Adapter):
    """bitsandbytes' weight, multiplied in the manner of Unsloth."""

    def __init__(self, w: Tensor, workspace: Workspace) -> None:
        super().__init__(*w.shape, device=w.device)
        self.theirs, self.workspace = Theirs.of(w.bfloat16()), workspace

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        y: Tensor = _Sequence.apply(x, self.lora_A, self.lora_B, self.theirs, self.workspace)
        return y


def with_qkern(w: Tensor) -> nn.Module:
    """``QLoRALinear``."""
    settings = {"r": R, "lora_alpha": SCALING * R, "dtype": BF16}
    return qkern.QLoRALinear.from_linear(dense(w), **settings)


def linear_4bit(w: Tensor) -> nn.Module:
    """bitsandbytes' layer: NF4, nested, computing in bf16."""
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=BF16, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(w.bfloat16(), requires_grad=False, quant_type="nf4")
    found: nn.Module = layer.to(w.device)
    return found


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's."""
        y: Tensor = self.layer(x)
        return y


def with_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    """PEFT's adapters on a model's layers of bitsandbytes, in bf16 as all others are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        settings = {"r": R, "lora_alpha": SCALING * R, "lora_dropout": 0.0, "bias": "none"}
        config = peft.LoraConfig(target_modules=targets, **settings)
        made: nn.Module = peft.get_peft_model(model, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(BF16)
    return made


def peft_layer(w: Tensor) -> nn.Module:
    """One of bitsandbytes' layers under PEFT."""
    return with_peft(Holder(linear_4bit(w)), ["layer"])


class Parts:
    """What a layer of any package multiplies: W in fp32, and its adapter's two parameters."""

    def __init__(self, layer: nn.Module) -> None:
        self.W, self.adapter = self.weight_of(layer), self.adapter_of(layer)

    @staticmethod
    def weight_of(layer: Any) -> Tensor:
        """fp32 (N, K)."""
        if isinstance(layer, SequenceLinear):
            return layer.theirs.dense().float()
        if isinstance(layer, qkern.QLoRALinear):
            return layer.quantized_weight.dequantize(torch.float32)
        if isinstance(layer, (nn.Linear, DenseLoRA)):
            return getattr(layer, "linear", layer).weight.float()
        weight = _tuned(layer).base_layer.weight
        found: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
        return found.float()

    @staticmethod
    def adapter_of(layer: Any) -> tuple[nn.Parameter, ...]:
        """A and B, or nothing."""
        if isinstance(layer, (Adapter, qkern.QLoRALinear)):
            return layer.lora_A, layer.lora_B
        if isinstance(layer, nn.Linear):
            return ()
        tuned = _tuned(layer)
        return tuple(getattr(tuned, name)["default"].weight for name in ("lora_A", "lora_B"))

    @classmethod
    def fill_adapter(cls, layer: nn.Module, seed: int = 1) -> None:
        """The same values in every package; B is not zero, or A would have no gradient."""
        for part in cls.adapter_of(layer):
            part.data.normal_(std=0.02, generator=torch.Generator(part.device).manual_seed(seed))


def _tuned(layer: Any) -> Any:
    """PEFT's layer, out of the model of one layer if it is in one."""
    return layer if hasattr(layer, "base_layer") else layer.base_model.model.layer


def copied(layer: nn.Module, count: int) -> list[nn.Module]:
    """The layer, and copies with weights of their own; buffers that layers share stay shared."""
    shared = {
        id(module.workspace): module.workspace
        for module in layer.modules()
        if isinstance(module, SequenceLinear)
    }
    return [layer, *(copy.deepcopy(layer, dict(shared)) for _ in range(count - 1))]


# What trains an adapter over one weight (N, K); Unsloth's way asks for its buffers.
Maker = Callable[[Tensor], nn.Module]
OWN: dict[str, Maker] = {
    "torch bf16, frozen, no LoRA": dense,
    "torch bf16 with LoRA": lambda w: DenseLoRA(dense(w)),
    "qkern": with_qkern,
}


def peers(device: torch.device, largest: int) -> dict[str, Maker]:
    """Those that need other packages.

    Raises:
        ImportError: if bitsandbytes cannot be had.
    """
    bitsandbytes()
    workspace = Workspace(device, largest)
    return {
        "Unsloth sequence": lambda w: SequenceLinear(w, workspace),
        "PEFT + bitsandbytes": peft_layer,
    }
