"""A LoRA layer for PEFT that multiplies base and adapter in one operator, as an opt-in.

PEFT works over quantized layers by itself: nothing here is needed for that. Its LoRA layer then
calls the base and the two factors one after another; this one hands all of them to
``qkern.linear``, forward and backward. Where it cannot be sure to compute the same it takes PEFT's
own path, and its adapters are PEFT's files, which know nothing of it.

    config = qkern.integrations.peft.fused(LoraConfig(r=16, target_modules="all-linear"))
    model = get_peft_model(model, config)
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from qkern.errors import AdapterMismatchError, MissingDependencyError
from qkern.functional import linear
from qkern.layers import QuantizedLinear

try:
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners import lora
except ModuleNotFoundError as error:
    _MSG = f'this needs {error.name}: pip install "qkern[peft]"'
    raise MissingDependencyError(_MSG) from error

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Adapter(NamedTuple):
    """What ``qkern.linear`` takes of an adapter."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA layer over a ``QuantizedLinear``, in one operator where that is the same.

    Attributes, files, merging and adapter switching are PEFT's. Its forward is PEFT's too for
    anything but one active adapter of plain LoRA: variants (DoRA, aLoRA and others), ``lora_bias``,
    several active adapters, ``adapter_names``, merged or disabled adapters, hooks on what would be
    bypassed, and a base that is not exactly a ``QuantizedLinear``.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        if self.fan_in_fan_out:  # as PEFT does for every nn.Linear
            warnings.warn("fan_in_fan_out=True is for Conv1D: it is False here", stacklevel=2)
            self.fan_in_fan_out = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        is_plain = not args and all(value is None for value in kwargs.values())
        adapter = self._fusible_adapter() if is_plain else None
        if adapter is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = cast("QuantizedLinear", self.base_layer)
        return linear(
            x,
            base.quantized_weight,
            base.bias,
            lora_A=adapter.lora_A,
            lora_B=adapter.lora_B,
            scaling=adapter.scaling,
            lora_dropout=adapter.dropout,
            compute=base.compute,
            layer=base,
        )

    def _fusible_adapter(self) -> _Adapter | None:
        """The only active adapter, if it is plain LoRA and nothing would be bypassed."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged:
            return None
        name = names[0]
        # Before there were variants, DoRA had an attribute of its own.
        is_variant = name in getattr(self, "lora_variant", {}) or self.use_dora.get(name, False)
        if is_variant or not _is_bare(self.base_layer):
            return None
        factors = (self.lora_A[name], self.lora_B[name])
        if any(type(factor) is not nn.Linear or _is_watched(factor) for factor in factors):
            return None
        if any(factor.bias is not None for factor in factors):
            return None
        drop = self.lora_dropout[name]
        if type(drop) not in (nn.Identity, nn.Dropout) or _is_watched(drop):
            return None
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        if dropout >= 1.0:
            return None
        A, B = (cast("Tensor", factor.weight) for factor in factors)
        return _Adapter(A, B, self.scaling[name], dropout)

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.Fused", "qkern.Fused", 1)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody would miss that the module is not called."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def _is_bare(base: nn.Module) -> bool:
    """Whether a call of ``base`` is one of ``qkern.linear``, and nothing else."""
    return (
        isinstance(base, QuantizedLinear)
        and type(base).forward is QuantizedLinear.forward
        and base.siblings is None
        and not _is_watched(base)
    )


def fused(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration use ``FusedLoraLinear`` over quantized layers; in place.

    PEFT keeps this in memory only: files are the same with and without. Other layers, and dense
    ones, get PEFT's.

    Args:
        config: for ``get_peft_model``, ``add_adapter`` or TRL's ``peft_config``.

    Returns:
        The same object.

    Raises:
        AdapterMismatchError: for another kind of adapter.
    """
    if type(config) is not LoraConfig:
        msg = f"only a LoraConfig can be fused, got {type(config).__name__}: PEFT runs it as it is"
        raise AdapterMismatchError(msg)
    config._register_custom_module({QuantizedLinear: FusedLoraLinear})
    return config


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """``PeftModel.from_pretrained`` with fused layers; another adapter if ``model`` has some.

    Any adapter of plain LoRA that PEFT has written is loaded, whatever layers it was trained with.

    Args:
        model: a model with quantized layers, or a ``PeftModel`` of one.
        path: the adapter's directory, or its name on a hub.
        adapter_name: for PEFT's ``set_adapter``.
        is_trainable: False freezes it.
        **kwargs: for PEFT's ``from_pretrained`` or ``load_adapter``, such as ``subfolder``.

    Returns:
        The ``PeftModel``; ``model`` itself if it is one.

    Raises:
        AdapterMismatchError: for another kind of adapter.
        ValueError: if there is no adapter at ``path``, or ``model`` has one of that name.
    """
    directory = os.fspath(path)
    config = fused(PeftConfig.from_pretrained(directory, **kwargs))
    config.inference_mode = not is_trainable
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(
            model, directory, adapter_name, is_trainable=is_trainable, config=config, **kwargs
        )
    model.add_adapter(adapter_name, config)
    try:
        model.load_adapter(directory, adapter_name, is_trainable=is_trainable, **kwargs)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
    # load_adapter sees to that if it adds the adapter itself; before PEFT 0.18 nobody does
    if is_trainable and hasattr(model, "set_requires_grad"):
        model.set_requires_grad(adapter_name)
    return model
