"""``QuantizedLinear``: ``nn.Linear`` over a quantized weight, and how it takes a layer's place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkern import operands, shards
from qkern.codec import COMPUTE, check_choice
from qkern.errors import FormatError, ShapeError
from qkern.flat_weight import FlatWeight
from qkern.formats import QuantFormat, resolve_format
from qkern.functional import linear
from qkern.tensor import QuantizedTensor

_Layer = TypeVar("_Layer", bound=nn.Linear)
_Module = TypeVar("_Module", bound=nn.Module)


class QuantizedLinear(FlatWeight, nn.Linear):
    """``nn.Linear`` whose frozen weight is a ``QuantizedTensor``.

    Its ``state_dict`` holds bitsandbytes' flat keys (of ``Linear4bit``, or of ``Linear8bitLt`` for
    int8_row) and loads strictly. Build it with ``from_linear``.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        compute: "exact" or "int8", see ``qkern.linear``. It is no part of a ``state_dict``.

    Attributes:
        path: where a model holds the layer, for errors; empty until a model is quantized or loaded.
        compute: as above; may be set at any time.
        siblings: set by ``qkern.fuse_projections``: what computes the layer with others.
        fan_in_fan_out: whether it took the place of a ``Conv1D``, of which dense checkpoints hold
            the weight as (in_features, out_features).

    Raises:
        ShapeError: for a weight that has not 2 dimensions, or a bias that does not fit.
        FormatError: for another ``compute``.
    """

    weight: nn.Parameter
    path: str = ""
    compute: str = "exact"
    siblings: Any = None
    fan_in_fan_out: bool = False

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None = None,
        *,
        compute: str = "exact",
    ) -> None:
        nn.Module.__init__(self)
        check_choice("compute", compute, COMPUTE)
        self.compute = compute
        if weight.dim() != 2:
            msg = f"a linear layer needs a weight of 2 dimensions, got {tuple(weight.shape)}"
            raise ShapeError(msg)
        self.out_features, self.in_features = weight.shape
        if bias is not None:
            operands.check_bias(bias, self.out_features, self)
        with torch.inference_mode(False):  # what is made under it could never be trained on
            self.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None and bias.is_inference():
                bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        *,
        quant_type: str | QuantFormat = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        method: str = "absmax",
        importance: Tensor | None = None,
        nonfinite: str = "error",
        compute: str = "exact",
    ) -> QuantizedLinear:
        """Quantize a dense layer's weight; its bias is kept, frozen.

        Args:
            layer: ``nn.Linear``.
            quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
            blocksize: values that share a scale; unused by int8_row, where a row does.
            double_quant: store the scales in 8 bits; unused by int8_row.
            method: "absmax" or "search", see ``qkern.quantize``.
            importance: (in_features,) weights of the errors for "search".
            nonfinite: "error" or "keep", see ``qkern.quantize``.
            compute: "exact" or "int8", see ``qkern.linear``.

        Raises:
            FormatError: if the layer is quantized already, has a forward of its own, or computes
                its weight from other parameters (``parametrize``, weight norm, pruning), and for
                an unknown format or setting.
            DTypeError: unless the layer is an ``nn.Linear`` and its weight a plain float32, float16
                or bfloat16 tensor.
            NonFiniteError: for NaN or infinity in the weight.
        """
        if isinstance(layer, QuantizedLinear):
            msg = "the layer is quantized already"
            raise FormatError(msg)
        operands.check_layer(layer)
        check_choice("compute", compute, COMPUTE)
        fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
        weight = QuantizedTensor.from_dense(
            layer.weight, fmt, method=method, importance=importance, nonfinite=nonfinite
        )
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return take_over(cls(weight, layer.bias, compute=compute), layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        shared = self._output_with_siblings(x)
        if shared is not None:
            return shared
        return linear(x, self.quantized_weight, self.bias, compute=self.compute, layer=self)

    def _output_with_siblings(self, x: Tensor) -> Tensor | None:
        """The output, if it is computed with those of other layers."""
        if self.siblings is None or torch.compiler.is_compiling():
            return None
        shared: Tensor | None = self.siblings.output(self, x)
        return shared

    def extra_repr(self) -> str:
        """Sizes and format, for ``print(model)``."""
        weight = self.weight
        fmt = getattr(shards.local_part(weight), "format", None)
        how = "" if self.compute == "exact" else f", compute={self.compute}"
        return f"{super().extra_repr()}, {fmt}{how}"

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense ``nn.Linear`` with the weight that this layer multiplies."""
        weight = self.quantized_weight.dequantize(dtype)
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return layer.train(self.training)


# What nn.Module keeps of hooks on forward and backward, and on state dicts.
_HOOKS = (
    *(f"_forward_hooks{kind}" for kind in ("", "_with_kwargs", "_always_called")),
    *(f"_forward_pre_hooks{kind}" for kind in ("", "_with_kwargs")),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def take_over(layer: _Layer, replaced: nn.Linear) -> _Layer:
    """The new layer, in the mode, with hooks and settings of the one whose place it takes."""
    if isinstance(layer, QuantizedLinear) and isinstance(replaced, QuantizedLinear):
        names = ("path", "compute", "siblings", "fan_in_fan_out")
        vars(layer).update({name: vars(replaced)[name] for name in names if name in vars(replaced)})
    return take_hooks(layer, replaced)


def take_hooks(layer: _Module, replaced: nn.Module) -> _Module:
    """The new module, in the mode and with the hooks of the one whose place it takes."""
    vars(layer).update({name: vars(replaced)[name] for name in _HOOKS if name in vars(replaced)})
    before_load: dict[int, Any] = layer._load_state_dict_pre_hooks
    for key, hook in before_load.items():  # these know the module that they were put on
        if getattr(hook, "with_module", False):
            before_load[key] = type(hook)(hook.hook, layer)
    return layer.train(replaced.training)
