"""Linear layers over a quantized weight: ``QuantizedLinear``, and with an adapter ``QLoRALinear``.

    y = x W^T + bias                              QuantizedLinear
    y = x W^T + bias + scaling (x A^T) B^T        QLoRALinear

with the adapter that is active, of those that the layer holds by name.

LoRA: Hu et al., https://arxiv.org/abs/2106.09685; over 4-bit weights: Dettmers et al.,
https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkern import merge_aware, operands
from qkern.adapter_holder import AdapterHolder
from qkern.codec import COMPUTE, check_choice
from qkern.dora import RowNorms
from qkern.errors import AdapterMismatchError, FormatError
from qkern.formats import QuantFormat, resolve_format
from qkern.functional import linear
from qkern.lora_adapter import DEFAULT, PLAIN_INITS, LoRAAdapter
from qkern.lora_init import Start, start_from_weight
from qkern.merge_target import MergeTarget
from qkern.merged_state import MergedState
from qkern.quantized_linear import QuantizedLinear, take_over
from qkern.tensor import QuantizedTensor

__all__ = ["QLoRALinear", "QuantizedLinear"]


class QLoRALinear(MergedState, AdapterHolder, QuantizedLinear):
    """``QuantizedLinear`` with trainable low-rank adapters in the same operator.

    It holds adapters by name, one of which is active, and is made with a first one. ``lora_A``,
    ``r`` and what else an adapter has are here those of the active one.

    Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        r: rank, 1 or more.
        lora_alpha: the adapter's part is multiplied by ``lora_alpha / r``.
        lora_dropout: probability of zeroing an input of the adapter's part, in training.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead
            (https://arxiv.org/abs/2312.03732).
        use_dora: train the lengths of the sum's rows too, see ``qkern.dora``.
        init_lora_weights: True: A as ``nn.Linear`` is, B zero, so that training starts at the
            base; "gaussian": A normal of deviation 1/r; False: B random too; "loftq", "pissa",
            "pissa_niter_N" or "olora": from the weight, see ``qkern.lora_init``.
        dense: (out_features, in_features), what the weight was quantized from, for those: LoftQ
            needs it. The others take ``weight`` itself if it is None.
        loftq_iterations: of LoftQ; the best one counts. From 2 on they change the base.
        method: "absmax" or "search", for a base that the initialization changes.
        dtype: of the adapter; fp32 unless given.
        lora_mode: "separate", or "merged" for GPUs, see ``qkern.linear``. Like ``compute`` it is an
            attribute that may be set at any time, and no part of a file.
        compute: "exact" or "int8", see ``qkern.linear``; gradients are exact with either.
        merge_into: train the first adapter for a merge into this format ("nf4", a ``QuantFormat``
            or a ``MergeTarget``): the layer multiplies what such a merge would leave, see
            ``qkern.merge_aware``. An attribute, too, of the active adapter, as resolved: a
            ``MergeTarget`` or None.
        adapter_name: of the first adapter.

    Attributes:
        adapters: ``LoRAAdapter`` by name.
        active_adapter: name of the active one; None, or a name that the layer does not hold, for
            the base alone.
        merged: whether the active adapter is in the weight.
        rows: set by ``qkern.adapter_rows``: the adapter of each row of a batch.
    """

    lora_mode: str = "separate"

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None = None,
        *,
        lora_mode: str = "separate",
        compute: str = "exact",
        adapter_name: str = DEFAULT,
        **lora: Any,
    ) -> None:
        super().__init__(weight, bias, compute=compute)
        check_choice("lora_mode", lora_mode, operands.LORA_MODES)
        self.lora_mode = lora_mode
        self.adapters = nn.ModuleDict()
        self.row_norms = RowNorms()
        self.active_adapter = adapter_name
        self.add_adapter(adapter_name, self.make_adapter(**lora))

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
            lora = {"dense": layer.weight, **lora}
            layer = QuantizedLinear.from_linear(
                layer, quant_type=fmt, method=method, importance=importance, nonfinite=nonfinite
            )
        made = take_over(cls(layer.quantized_weight, layer.bias, method=method, **lora), layer)
        made.compute = made.compute if compute is None else compute
        return made

    def make_adapter(
        self,
        *,
        init_lora_weights: bool | str = True,
        dense: Tensor | None = None,
        loftq_iterations: int = 1,
        method: str = "absmax",
        merge_into: str | QuantFormat | MergeTarget | None = None,
        **lora: Any,
    ) -> LoRAAdapter:
        """An adapter that fits the layer, see there for the arguments.

        Raises:
            ShapeError: for a rank below 1, or a dropout outside of [0, 1).
            DTypeError: for a ``dtype`` that an adapter cannot have.
            FormatError: for an unknown setting, or what ``lora_mode="merged"`` or ``merge_into``
                has not.
            AdapterMismatchError: for another layer's dense weight, or if the base would change
                under other adapters.
            DeviceError: for a start from a weight that is on meta.
        """
        lora_dropout = lora.get("lora_dropout", 0.0)
        if self.lora_mode == "merged" and lora_dropout > 0.0:
            msg = f"lora_mode='merged' has no dropout of the adapter's own, got {lora_dropout}"
            raise FormatError(msg)
        if self.lora_mode == "merged" and lora.get("use_dora"):
            msg = "lora_mode='merged' has no DoRA: it scales what the weight and the adapter make"
            raise FormatError(msg)
        weight = self.quantized_weight
        sizes = (self.out_features, self.in_features)
        is_plain = init_lora_weights in PLAIN_INITS
        lora["init_lora_weights"] = init_lora_weights if is_plain else True
        adapter = LoRAAdapter(*sizes, device=weight.device, **lora)
        adapter.merge_into = self.target_of(adapter, merge_into)
        if isinstance(init_lora_weights, str) and not is_plain:
            start = start_from_weight(
                init_lora_weights,
                weight,
                dense,
                r=adapter.r,
                scaling=adapter.scaling,
                iterations=loftq_iterations,
                method=method,
            )
            if start is not None:
                self._start(adapter, start, init_lora_weights)
                weight = self.quantized_weight
                adapter.merge_into = self.target_of(adapter, merge_into)  # of the new base
        if adapter.lora_magnitude is not None and not weight.is_meta:
            with torch.no_grad():
                adapter.lora_magnitude.copy_(self.row_norms.of(weight, adapter))
        return adapter

    def _start(self, adapter: LoRAAdapter, start: Start, init_lora_weights: str) -> None:
        if start.weight is not None and self.adapters:
            msg = (
                f"{self._name()} has adapters {sorted(self.adapters)}, whose base "
                f"init_lora_weights={init_lora_weights!r} would change: delete them first"
            )
            raise AdapterMismatchError(msg)
        with torch.no_grad():
            adapter.lora_A.copy_(start.A)
            adapter.lora_B.copy_(start.B)
        if start.weight is not None:
            adapter.changed_base = init_lora_weights
            with torch.inference_mode(False):  # what is made under it could never be trained on
                self.weight = nn.Parameter(start.weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.merged:
            self._check_merged()
            return super().forward(x)
        if self.has_rows():
            y: Tensor = self.by_rows(
                x, lambda part, name: self._multiply(part, self.adapter_of(name))
            )
            return y
        shared = self._output_with_siblings(x)
        if shared is not None:
            return shared
        return self._multiply(x, self.adapter)

    def _multiply(self, x: Tensor, adapter: LoRAAdapter | None) -> Tensor:
        """The product with one of the adapters, or with none."""
        if adapter is None:
            return linear(x, self.quantized_weight, self.bias, compute=self.compute, layer=self)
        if adapter.merge_into is not None:
            return self._multiply_rounded(x, adapter, adapter.merge_into)
        if adapter.use_dora:
            return self._multiply_dora(x, adapter)
        return linear(
            x,
            self.quantized_weight,
            self.bias,
            lora_A=adapter.lora_A,
            lora_B=adapter.lora_B,
            scaling=adapter.scaling,
            lora_dropout=adapter.lora_dropout if self.training else 0.0,
            lora_mode=self.lora_mode,
            compute=self.compute,
            layer=self,
        )

    def _multiply_rounded(self, x: Tensor, adapter: LoRAAdapter, target: MergeTarget) -> Tensor:
        """The product with what a merge would leave."""
        merge_aware.check_settings(adapter, self.lora_mode, self.path)
        base, factors = (self.quantized_weight, self.bias), (adapter.lora_A, adapter.lora_B)
        return merge_aware.linear(
            x, *base, *factors, adapter.scaling, target, compute=self.compute, layer=self
        )

    def _multiply_dora(self, x: Tensor, adapter: LoRAAdapter) -> Tensor:
        """``(m / |V|) x V^T + bias``; what dropout takes from x is multiplied by W alone."""
        lengths = self.lengths(adapter)
        rate = adapter.lora_dropout if self.training else 0.0
        dropped = nn.functional.dropout(x, rate) if rate > 0.0 else x
        how: dict[str, Any] = {"compute": self.compute, "layer": self}
        factors: dict[str, Any] = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
        weight = self.quantized_weight
        y = linear(dropped, weight, **factors, scaling=adapter.scaling, **how)
        scaled = (y * lengths).to(y.dtype)
        if rate > 0.0:
            return scaled + linear(x - dropped, weight, self.bias, **how)
        bias: Tensor | None = self.bias
        return scaled if bias is None else scaled + bias.to(y.dtype)

    def lengths(self, adapter: LoRAAdapter) -> Tensor:
        """``m / |V|``, fp32 (out_features,)."""
        keep = not (self.training or torch.is_grad_enabled())
        norms = self.row_norms.of(self.quantized_weight, adapter, keep=keep)
        magnitude: Tensor = adapter.lora_magnitude  # type: ignore[assignment]
        return magnitude.float() / norms

    def train(self, mode: bool = True) -> QLoRALinear:  # noqa: FBT001 - torch's signature
        """As in every module; what is kept for evaluation is computed again."""
        self.row_norms.forget()
        return super().train(mode)

    @property
    def merge_into(self) -> MergeTarget | None:
        """What the active adapter is trained to be merged into; may be set at any time."""
        return self.active().merge_into

    @merge_into.setter
    def merge_into(self, merge_into: str | QuantFormat | MergeTarget | None) -> None:
        adapter = self.active()
        adapter.merge_into = self.target_of(adapter, merge_into)

    def target_of(
        self, adapter: LoRAAdapter, merge_into: str | QuantFormat | MergeTarget | None
    ) -> MergeTarget | None:
        """What ``merge_into`` names for this layer's weight.

        Raises:
            FormatError: for an unknown format, and for an adapter that cannot be trained for it.
        """
        target = merge_aware.resolve_target(merge_into, self.quantized_weight)
        if target is not None:
            merge_aware.check_settings(adapter, self.lora_mode)
        return target

    def _check_merged(self) -> None:
        adapter = self.adapter
        trained = adapter is not None and adapter.lora_B.requires_grad
        if self.training and trained and torch.is_grad_enabled():
            msg = (
                f"{self.path or 'the layer'} is in training with a merged adapter, which would "
                "learn nothing: call unmerge_adapter before training, or model.eval() after it"
            )
            raise AdapterMismatchError(msg)

    def delta(self) -> Tensor:
        """What the active adapter adds to the weight, fp32 (out_features, in_features).

        Of a merged one: what it has added, but for the rounding of the sum.
        """
        adapter = self.active()
        if not adapter.use_dora:
            return adapter.product()
        with torch.no_grad():
            dense, product = self.quantized_weight.dequantize(torch.float32), adapter.product()
            if self.merged and self._merged_lengths is not None:
                lengths = self._merged_lengths.to(dense.device)[:, None]
                return dense - (dense / lengths - product)
            self._merged_lengths = self.lengths(adapter)
            return self._merged_lengths[:, None] * (dense + product) - dense

    def extra_repr(self) -> str:
        """Sizes, format and the active adapter, for ``print(model)``."""
        how = "" if self.lora_mode == "separate" else f", lora_mode={self.lora_mode}"
        return f"{super().extra_repr()}, active_adapter={self.active_adapter}{how}"
