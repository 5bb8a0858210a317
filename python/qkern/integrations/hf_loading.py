"""How transformers fills quantized modules, and what makes a dense weight a quantized one.

While it fills them, a module's ``state_dict`` names its weights alone, as that of a dense one
does: transformers looks each of its keys up as a parameter of the model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qkern.errors import CorruptFileError
from qkern.flat_weight import FlatParameters
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from qkern.integrations.hf_quantizer import QkernQuantizer


# -- modules that are filled -----------------------------------------------------------------


class _Filled(FlatParameters):
    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


@functools.cache
def _filled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Filled, kind), {"__doc__": kind.__doc__})


def begin_filling(model: nn.Module) -> None:
    """Have the quantized modules, which are on meta, name their weights alone."""
    for module in model.modules():
        if isinstance(module, FlatParameters):
            # Hooks and attributes stay.
            module.__class__ = _filled(type(module))  # type: ignore[assignment, arg-type]


def end_filling(model: nn.Module) -> None:
    """Make them what they were."""
    for module in model.modules():
        if isinstance(module, _Filled):
            module.__class__ = type(module).__bases__[1]


# -- operations ------------------------------------------------------------------------------


class Operation(ConversionOps):
    """What a weight goes through.

    Args:
        hf_quantizer: whose errors are kept; transformers looks for it, and casts no entry then.
    """

    def __init__(self, hf_quantizer: QkernQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> Operation:
        """Itself: copies are made for each entry, and all are to have the same quantizer."""
        return self


class Quantize(Operation):
    """A dense weight, quantized on the device where it is; on a CPU by all threads."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Dense tensors by the names of parameters, to what these are to be."""
        quantizer, model = self.hf_quantizer, kwargs["model"]
        result = {}
        for name, found in input_dict.items():
            value = found[0] if isinstance(found, list) else found
            empty = model.get_parameter(name)
            if isinstance(empty, QuantizedTensor):
                make = functools.partial(_quantized, quantizer, model, name, value)
                value = quantizer.attempt(make, empty, value.device)
            result[name] = value
        return result


def _quantized(quantizer: QkernQuantizer, model: nn.Module, name: str, value: Tensor) -> Tensor:
    value = as_held(model, name, value)
    needed = tuple(model.get_parameter(name).shape)
    if tuple(value.shape) != needed:
        msg = f"{name}: the checkpoint holds {tuple(value.shape)}, the model needs {needed}"
        raise CorruptFileError(msg)
    return quantizer.quantize(name, value)


def as_held(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A dense weight of a file as the module that replaced the dense one holds it."""
    module = model.get_submodule(name.rpartition(".")[0])
    return value.mT if getattr(module, "fan_in_fan_out", False) else value
