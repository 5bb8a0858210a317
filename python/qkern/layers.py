"""Linear layers over a quantized weight: ``QuantizedLinear``, and with an adapter ``QLoRALinear``.

    y = x W^T + bias                              QuantizedLinear
    y = x W^T + bias + scaling (x A^T) B^T        QLoRALinear

LoRA: Hu et al., https://arxiv.org/abs/2106.09685; over 4-bit weights: Dettmers et al.,
https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkern import merge_aware, operands, shards
from qkern.codec import COMPUTE, check_choice
from qkern.errors import FormatError, ShapeError
from qkern.flat_weight import FlatWeight
from qkern.formats import QuantFormat, resolve_format
from qkern.merge_target import MergeTarget
from qkern.tensor import QuantizedTensor, linear

_Layer = TypeVar("_Layer", bound=nn.Linear)


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

    Raises:
        ShapeError: for a weight that has not 2 dimensions, or a bias that does not fit.
        FormatError: for another ``compute``.
    """

    weight: nn.Parameter
    path: str = ""
    compute: str = "exact"
    siblings: Any = None

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
        return _take_over(cls(weight, layer.bias, compute=compute), layer)

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


class QLoRALinear(QuantizedLinear):
    """``QuantizedLinear`` with a trainable low-rank adapter in the same operator.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        r: rank, 1 or more.
        lora_alpha: the adapter's part is multiplied by ``lora_alpha / r``.
        lora_dropout: probability of zeroing an input of the adapter's part, in training.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead
            (https://arxiv.org/abs/2312.03732).
        init_lora_weights: True: A as ``nn.Linear`` is, B zero, so that training starts at the
            base; False: B random too.
        dtype: of the adapter; fp32 unless given.
        lora_mode: "separate", or "merged" for GPUs, see ``qkern.linear``. Like ``compute`` it is an
            attribute that may be set at any time, and no part of a file.
        compute: "exact" or "int8", see ``qkern.linear``; gradients are exact with either.
        merge_into: train for a merge into this format ("nf4", a ``QuantFormat`` or a
            ``MergeTarget``): the layer multiplies what such a merge would leave, see
            ``qkern.merge_aware``. An attribute, too, as resolved: a ``MergeTarget`` or None.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_mode: str = "separate"

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None = None,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool = True,
        dtype: torch.dtype = torch.float32,
        lora_mode: str = "separate",
        compute: str = "exact",
        merge_into: str | QuantFormat | MergeTarget | None = None,
    ) -> None:
        super().__init__(weight, bias, compute=compute)
        check_choice("lora_mode", lora_mode, operands.LORA_MODES)
        if r < 1:
            msg = f"the rank r must be 1 or more, got {r}"
            raise ShapeError(msg)
        operands.check_dropout(lora_dropout)
        if lora_mode == "merged" and lora_dropout > 0.0:
            msg = f"lora_mode='merged' has no dropout of the adapter's own, got {lora_dropout}"
            raise FormatError(msg)
        self.r, self.lora_dropout, self.lora_mode = r, lora_dropout, lora_mode
        self.set_scaling(lora_alpha, use_rslora=use_rslora)
        self.merged = False
        self.merge_into = merge_aware.resolve_target(merge_into, weight)
        if self.merge_into is not None:
            merge_aware.check_settings(lora_dropout, lora_mode)
        with torch.inference_mode(False):
            A = torch.empty(r, self.in_features, device=weight.device, dtype=dtype)
            B = torch.empty(self.out_features, r, device=weight.device, dtype=dtype)
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
            self.reset_adapter(init_lora_weights=init_lora_weights)

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
        compute: str | None = None,
        **lora: Any,
    ) -> QLoRALinear:
        """Quantize a dense layer, or take a quantized one over, and add an adapter.

        Args:
            layer: ``nn.Linear`` or ``QuantizedLinear``.
            quant_type: see ``qkern.quantize``; a quantized layer keeps its own, and the next five.
            blocksize: values that share a scale.
            double_quant: store the scales in 8 bits.
            method: "absmax" or "search".
            importance: (in_features,) weights of the errors for "search".
            nonfinite: "error" or "keep".
            compute: "exact" or "int8"; None for what a quantized layer has, "exact" for a dense
                one.
            **lora: ``r``, ``lora_alpha`` and the other arguments of the class.

        Raises:
            FormatError: as ``QuantizedLinear.from_linear`` does, and for a layer that has an
                adapter already.
        """
        if compute is not None:
            check_choice("compute", compute, COMPUTE)
        if isinstance(layer, QLoRALinear):
            msg = "the layer has an adapter already"
            raise FormatError(msg)
        operands.check_layer(layer)
        if not isinstance(layer, QuantizedLinear):
            fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
            layer = QuantizedLinear.from_linear(
                layer, quant_type=fmt, method=method, importance=importance, nonfinite=nonfinite
            )
        made = _take_over(cls(layer.quantized_weight, layer.bias, **lora), layer)
        made.compute = made.compute if compute is None else compute
        return made

    def set_scaling(self, lora_alpha: float, *, use_rslora: bool) -> None:
        """Set the factor of the adapter's part."""
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    def reset_adapter(self, *, init_lora_weights: bool = True) -> None:
        """Initialize the adapter as PEFT does."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.merged:
            return super().forward(x)
        if self.merge_into is not None:
            base, adapter = (self.quantized_weight, self.bias), (self.lora_A, self.lora_B)
            return merge_aware.linear(
                x, *base, *adapter, self.scaling, self.merge_into, compute=self.compute, layer=self
            )
        shared = self._output_with_siblings(x)
        if shared is not None:
            return shared
        return linear(
            x,
            self.quantized_weight,
            self.bias,
            lora_A=self.lora_A,
            lora_B=self.lora_B,
            scaling=self.scaling,
            lora_dropout=self.lora_dropout if self.training else 0.0,
            lora_mode=self.lora_mode,
            compute=self.compute,
            layer=self,
        )

    def delta(self) -> Tensor:
        """``scaling B A``, fp32 (out_features, in_features)."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()) * self.scaling

    def extra_repr(self) -> str:
        """Sizes, format and the adapter's rank, for ``print(model)``."""
        how = "" if self.lora_mode == "separate" else f", lora_mode={self.lora_mode}"
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}{how}"


# What nn.Module keeps of hooks on forward and backward.
HOOKS = (
    *(f"_forward_hooks{kind}" for kind in ("", "_with_kwargs", "_always_called")),
    *(f"_forward_pre_hooks{kind}" for kind in ("", "_with_kwargs")),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def _take_over(layer: _Layer, replaced: nn.Linear) -> _Layer:
    """The new layer, in the mode, with hooks and settings of the one whose place it takes."""
    own = ("path", "compute", "siblings") if isinstance(replaced, QuantizedLinear) else ()
    kept = (*HOOKS, *own)
    vars(layer).update({name: vars(replaced)[name] for name in kept if name in vars(replaced)})
    return layer.train(replaced.training)
