"""What a run can be refused for before its data is read and its model loaded."""

from __future__ import annotations

from os import PathLike

from qkern.adapter_targets import find_targets
from qkern.integrations.pretrained import empty_model
from qkern.model import quantize_model
from qkern.training.base import check_compute, resolve_device, resolve_dtype
from qkern.training.config import FinetuneConfig


def check_run(model_path: str | PathLike[str], config: FinetuneConfig) -> None:
    """Refuse settings that this machine or the model cannot follow; nothing is written.

    Args:
        model_path: a model directory or GGUF file, of which only the configuration is read.
        config: the settings.

    Raises:
        FileNotFoundError: there is no model at ``model_path``.
        SettingError: for a device, a dtype or a ``compute`` that is not there.
        AdapterMismatchError: for a target that names no layer, with the nearest ones.
    """
    device = resolve_device(config.device)
    resolve_dtype(config.dtype, device)
    check_compute(config.compute, device)
    if config.target_modules == "all-linear" and not config.target_parameters:
        return
    model = empty_model(model_path)
    quantize_model(model, config.format)
    find_targets(model, config.target_modules, config.target_parameters)
