"""The quantizer that transformers asks when ``quantization_config`` names qkern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from qkern.coverage import CoverageReport
from qkern.errors import AdapterMismatchError, DeviceError, QkernError
from qkern.flat_weight import FlatWeight
from qkern.integrations import hf_loading
from qkern.integrations.hf_config import QkernConfig
from qkern.integrations.hf_selection import quantize_empty
from qkern.integrations.pretrained import cast_parameters
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.module_tree import module_paths, replace_module
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QkernQuantizer(HfQuantizer):
    """Quantizes dense checkpoints weight by weight as they are read, and opens quantized ones.

    Args:
        quantization_config: what to do.
        **kwargs: ``pre_quantized``: whether the checkpoint is quantized already.

    Attributes:
        coverage: what became of each weight of a dense checkpoint; None for a quantized one.
        error: the first one while weights were made, raised when transformers is done.
    """

    quantization_config: QkernConfig
    requires_calibration = False

    def __init__(self, quantization_config: QkernConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.coverage: CoverageReport | None = None
        self.error: QkernError | None = None
        self._names: dict[str, bool] = {}

    # -- what transformers asks before it reads -----------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse maps that transformers would fill with dense weights, or not at all.

        Raises:
            DeviceError: for modules on disk, or on a CPU beside an accelerator.
        """
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, Mapping):
            return
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and places != {"cpu"}):
            where = sorted(f"{name or 'the model'}: {p}" for name, p in device_map.items())
            msg = (
                f"device_map={', '.join(where[:3])}, ...: quantized weights cannot be offloaded to "
                "disk, nor to the CPU beside an accelerator: use one kind of device, device_map="
                "'cpu' for one, or raise max_memory; qkern.load(path, device=...) copies the 4 "
                "bits of each weight only"
            )
            raise DeviceError(msg)

    def update_device_map(self, device_map: Any) -> Any:
        """Where there is an accelerator and nothing is said: there, as bitsandbytes does."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes a value, for device maps."""
        return param.nbytes / max(param.numel(), 1)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter is to be quantized."""
        module, _, name = param_name.rpartition(".")
        return isinstance(getattr(model.get_submodule(module), name, None), QuantizedTensor)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if self.pre_quantized:
            source = hf_loading.open_source(files)
            self._names = hf_loading.place_layers(model, source)
            self.quantization_config.describe(hf_loading.main_format(source), (), "float32")
        else:
            config = self.quantization_config
            names = config.modules_to_not_convert
            self.coverage = quantize_empty(model, config.format, names, files)
            if config.min_coverage is not None:
                self.coverage.check(config.min_coverage)
        hf_loading.begin_filling(model)

    # -- what it asks while it reads ----------------------------------------------------------

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """The model's own conversions, and that of a quantized file's entries."""
        mine = [hf_loading.converter(self, self._names)] if self._names else []
        return [*mine, *weight_conversions]

    def get_quantize_ops(self) -> hf_loading.Quantize:
        """What makes a dense weight a quantized one."""
        return hf_loading.Quantize(self)

    def quantize(self, name: str, value: Tensor) -> Tensor:
        """A dense weight, quantized.

        Raises:
            QkernError: with the name of the weight.
        """
        config = self.quantization_config
        try:
            return QuantizedTensor.from_dense(value, config.format.template, method=config.method)
        except QkernError as error:
            msg = f"{name}: {error}"
            raise type(error)(msg) from error

    def attempt(
        self, make: Callable[[], Tensor], empty: Tensor, device: torch.device
    ) -> nn.Parameter:
        """What ``make`` returns; after an error, which is kept, something of the same kind.

        transformers would swallow the error and say that a conversion failed.
        """
        if self.error is None:
            try:
                return nn.Parameter(make(), requires_grad=False)
            except QkernError as error:
                self.error = error
        return nn.Parameter(torch.empty_like(empty, device=device), requires_grad=False)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        hf_loading.end_filling(model)
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, FlatWeight)}
        for name, module in quantized.items():
            # Of a tensor that is split into several, transformers asks about the first alone.
            if not isinstance(module.weight, QuantizedTensor):
                made = self.quantize(f"{name}.weight", module.weight.detach())
                module.weight = nn.Parameter(made, requires_grad=False)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.requires_grad_(False)
        _keep_conversions_of_dense(model, [f"{name}.weight" for name in quantized])
        dense = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in quantized
        ]
        fmt = self.quantization_config.format
        self.quantization_config.describe(fmt, dense, str(model.dtype).removeprefix("torch."))
        return model

    # -- what it asks of a loaded model -------------------------------------------------------

    def is_serializable(self) -> bool:
        """Layers write their weights under flat keys."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over the frozen weights are: PEFT's."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """For a Trainer this means: without PEFT. So it takes qkern's own adapters."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        layers = [
            (layer, names)
            for layer, names in module_paths(model)
            if isinstance(layer, QuantizedLinear)
        ]
        for layer, names in layers:
            if isinstance(layer, QLoRALinear) and not layer.merged:
                msg = f"{names[0]} has an adapter, which would be lost: qkern.merge_adapter first"
                raise AdapterMismatchError(msg)
        for layer, names in layers:
            dense = layer.dequantize(dtype).requires_grad_(True)
            replace_module(model, names, _with_hook(dense, layer))
        if dtype is not None:
            cast_parameters(model, dtype)
        return model


def _keep_conversions_of_dense(model: PreTrainedModel, names: list[str]) -> None:
    """Forget conversions that ``save_pretrained`` would apply to packed bytes.

    Files then hold these weights under the model's own names, which are read as they are.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [  # type: ignore[assignment] # torch types any attribute so
        entry
        for entry in conversions
        if not (isinstance(entry, WeightConverter) and _touches(entry, names))
    ]


def _touches(entry: WeightConverter, names: list[str]) -> bool:
    try:
        back = entry.reverse_transform()
    except NotImplementedError:
        return True
    return any(back.rename_source_key(name)[1] is not None for name in names)


def _with_hook(layer: nn.Module, replaced: nn.Module) -> nn.Module:
    """The layer with the hook by which accelerate moves inputs to its device."""
    hook = getattr(replaced, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    return layer
