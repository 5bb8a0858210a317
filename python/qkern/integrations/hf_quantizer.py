"""The quantizer that transformers asks when ``quantization_config`` names qkern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from qkern import flat_keys
from qkern.checkpoint.placing import place_tied
from qkern.coverage import CoverageReport
from qkern.errors import DeviceError, QkernError
from qkern.flat_weight import FlatParameters
from qkern.integrations import hf_entries, hf_files, hf_loading
from qkern.integrations.hf_config import METHOD, QkernConfig
from qkern.integrations.hf_dequantizing import dequantize_modules, with_hook
from qkern.integrations.hf_selection import quantize_empty, tied_keys
from qkern.layers import QuantizedLinear
from qkern.module_tree import module_at, module_paths
from qkern.tensor import QuantizedTensor
from qkern.weight_sites import dense_linear

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
        self._placed: hf_files.Placed | None = None
        self._quantized: list[str] = []
        self._conversions: list[Any] | None = None

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
            source = hf_files.open_source(files)
            self._placed = hf_files.place_layers(model, source)
            self.quantization_config.describe(hf_files.main_format(source), (), "float32")
        else:
            config = self.quantization_config
            names = config.modules_to_not_convert
            plain = config.save_as != METHOD
            self.coverage = quantize_empty(model, config.format, names, files, plain=plain)
            if config.min_coverage is not None:
                self.coverage.check(config.min_coverage)
        self._quantized = _quantized_names(model)
        hf_loading.begin_filling(model)

    # -- what it asks while it reads ----------------------------------------------------------

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """The model's own conversions, and that of a quantized file's entries."""
        mine = [] if self._placed is None else hf_entries.converters(self, self._placed)
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
        for name in self._quantized:
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            weight = module._parameters[key]
            # Of a tensor that is split into several, transformers asks about the first alone.
            if weight is not None and not isinstance(weight, QuantizedTensor):
                values = hf_loading.as_held(model, name, weight.detach())
                made = self.quantize(name, values)
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
            if isinstance(module, QuantizedLinear) and module.bias is not None:
                module.bias.requires_grad_(False)
        _place_tied(model)
        self._conversions = getattr(model, "_weight_conversions", None)
        _keep_conversions_of_dense(model, self._quantized)
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, FlatParameters)}
        fmt, plain = self.quantization_config.format, _is_plain(quantized)
        dtype = str(model.dtype).removeprefix("torch.")
        self.quantization_config.describe(fmt, dense_linear(model), dtype, plain=plain)
        return model

    # -- what it asks of a loaded model -------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """The ``state_dict``, if a head shares its quantized weight: without the head's entries.

        Of a dense head transformers leaves them out by itself.
        """
        parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        shared = {
            target: parameters[target]
            for target, owner in tied_keys(model).items()
            if isinstance(parameters.get(target), QuantizedTensor)
            and parameters[target] is parameters.get(owner)
        }
        if not shared or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        left = {
            key for target, weight in shared.items() for key in flat_keys.known_keys(weight, target)
        }
        return {key: t for key, t in model.state_dict().items() if key not in left}, {}

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
        dequantize_modules(model, dtype)
        if self._conversions is not None:
            model._weight_conversions = [  # type: ignore[assignment] # torch's type
                entry for entry in self._conversions if not _is_ours(entry)
            ]
        return model


def _quantized_names(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, FlatParameters)
        for name in module.quantized_names()
    ]


def _is_plain(modules: Mapping[str, nn.Module]) -> bool:
    """Whether bitsandbytes has modules of these kinds."""
    return all(isinstance(module, QuantizedLinear) for module in modules.values())


def _place_tied(model: nn.Module) -> None:
    """Make heads quantized ones that got their weight from a quantized embedding."""
    heads = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and isinstance(module.weight, QuantizedTensor)
    }
    place_tied(model, {name: names for _, names in module_paths(model) for name in names})
    for name, module in heads.items():
        with_hook(module_at(model, name), module)


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


def _is_ours(entry: Any) -> bool:
    return any(isinstance(op, hf_loading.Operation) for op in getattr(entry, "operations", ()))


def _touches(entry: WeightConverter, names: list[str]) -> bool:
    if _is_ours(entry):
        return True
    try:
        back = entry.reverse_transform()
    except NotImplementedError:
        return True
    return any(back.rename_source_key(name)[1] is not None for name in names)
