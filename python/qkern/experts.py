"""Experts that a mixture-of-experts layer holds as stacked parameters, quantized.

    h = act(x W_up[e]^T + b_up[e])      for the rows of each expert e, gated as the class does it
    y = h W_down[e]^T + b_down[e]
    out = sum over a token's experts of its weight times y

What is taken: modules of transformers 5 that are written for its experts interface, which says by
attributes how a class holds and gates its weights (``has_gate``, ``has_bias``, ``is_transposed``,
``_apply_gate``). So one forward serves every model, and transformers is not imported.

A parameter keeps its shape, (experts, out, in), or (experts, in, out) where the class holds it so.
Each expert is whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern.derived_class import DerivedClass, derive, restore
from qkern.flat_weight import FlatParameters
from qkern.formats import QuantFormat
from qkern.functional import grouped_linear
from qkern.lora_adapter import LoRAAdapter
from qkern.tensor import QuantizedTensor

# What the experts interface of transformers gives every module of its classes.
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
# Only read, and stored (experts, out, in) by whoever writes it, however a class holds its own.
_NEVER_TRANSPOSED = "mxfp4"


class QuantizedExperts(DerivedClass, FlatParameters):
    """What ``quantize_experts`` adds to a class of experts: its forward and its ``state_dict``.

    Attributes:
        path: where a model holds the module, for errors; empty until a model is quantized or
            loaded.
    """

    path: str = ""
    # Of the class that is derived from.
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k) integers: each token's experts; those that are none of this
                module's add nothing.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden).
        """
        up, down = weight_names(self)
        if not all(isinstance(getattr(self, name), QuantizedTensor) for name in (up, down)):
            # Something computes a weight anew, as PEFT does for adapters of parameters.
            self._check_dense()
            dense: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return dense
        return self._multiply(hidden_states, top_k_index, top_k_weights, {})

    def _multiply(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, LoRAAdapter],
    ) -> Tensor:
        """The same, with what adapters of weights add, by the names of these."""
        up, down = weight_names(self)
        tokens, k = top_k_index.shape
        count = getattr(self, up).shape[0]
        chosen = top_k_index.reshape(-1)
        chosen = chosen.masked_fill(chosen < 0, count)  # sorted behind the last expert
        expert, order = torch.sort(chosen, stable=True)  # (tokens k,)
        offsets = _ends(expert, count)
        rows = self._project(hidden_states[order // k], up, offsets, adapters.get(up))
        rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
        rows = self._project(rows, down, offsets, adapters.get(down))
        if getattr(self, "has_post_expert_norm", False):
            rows = self.post_expert_norm(rows)
        rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (tokens k, hidden)
        place = torch.argsort(order)
        total: Tensor = rows[place].view(tokens, k, rows.shape[-1]).sum(1)
        return total.to(hidden_states.dtype)

    def _check_dense(self) -> None:
        """Refuse to compute over dense values what these alone do not make."""

    def _project(
        self, x: Tensor, name: str, offsets: Tensor, adapter: LoRAAdapter | None
    ) -> Tensor:
        weight: Any = getattr(self, name)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        transposed = is_transposed(self, weight.format)
        lora: dict[str, Any] = {}
        if adapter is not None:
            factors = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
            lora = {**factors, "scaling": adapter.scaling}
        return grouped_linear(x, weight, offsets, bias, **lora, transposed=transposed, layer=self)

    def extra_repr(self) -> str:
        """Sizes and formats, for ``print(model)``."""
        weights = {name: self._parameters[name] for name in self.quantized_names()}
        return ", ".join(
            f"{name}={tuple(weight.shape)} {getattr(weight, 'format', None)}"  # type: ignore[union-attr]
            for name, weight in weights.items()
        )


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The parameters that experts multiply: of the first product and of the second."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one whose stacked experts ``quantize_experts`` takes."""
    if not all(hasattr(module, name) for name in _INTERFACE):
        return False
    held = [module._parameters.get(name) for name in weight_names(module)]
    return all(parameter is not None and parameter.dim() == 3 for parameter in held)


def is_transposed(module: nn.Module, fmt: QuantFormat) -> bool:
    """Whether such a module has weights of a format as (experts, in, out)."""
    return bool(module.is_transposed) and fmt.quant_type != _NEVER_TRANSPOSED


def why_not(fmt: QuantFormat, shape: Sequence[int]) -> str:
    """Why stacked weights of (experts, ..., ...) cannot be quantized so; empty if they can."""
    size = shape[1] * shape[2]
    if fmt.kind.per_row:
        return f"{fmt.quant_type} has keys for parameters named weight alone"
    if size == 0 or size % fmt.blocksize:
        return (
            f"blocks would straddle experts: {size} values each, no multiple of the blocksize "
            f"{fmt.blocksize}"
        )
    return ""


def hold_quantized(module: nn.Module, name: str, weight: QuantizedTensor, path: str) -> None:
    """Give a module of experts a quantized weight, and the forward that multiplies it.

    Args:
        module: one for which ``is_experts`` holds; changed in place.
        name: of the parameter.
        weight: its new value.
        path: of the module, for errors.
    """
    with torch.inference_mode(False):
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if not isinstance(module, QuantizedExperts):
        derive(module, QuantizedExperts)
    module.path = path  # type: ignore[assignment]


def hold_dense(
    module: QuantizedExperts,
    dtype: torch.dtype | None = None,
    sums: Mapping[str, Tensor] | None = None,
) -> None:
    """Make quantized experts what they were, with the values that they multiply; in place.

    Args:
        module: changed in place.
        dtype: of the weights; the one that they report if None.
        sums: values of some of the weights, to take in place of their own.
    """
    for name in module.quantized_names():
        weight: Any = module._parameters[name]
        given = (sums or {}).get(name)
        values = weight.dequantize(dtype) if given is None else given
        if module.is_transposed and not is_transposed(module, weight.format):
            values = values.mT.contiguous()
        module._parameters[name] = nn.Parameter(values)
    vars(module).pop("path", None)
    restore(module)


def _ends(expert: Tensor, count: int) -> Tensor:
    """Where each expert's rows end, (count,) int64, by the sorted expert of each row."""
    return torch.searchsorted(
        expert, torch.arange(count, device=expert.device, dtype=expert.dtype), right=True
    )
