"""The frozen model of a run: loaded, quantized, and in the dtype that the machine computes well."""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import TYPE_CHECKING

import torch

from qkern import adapters
from qkern.adapted import quantized_layers
from qkern.formats import QuantFormat
from qkern.integrations.pretrained import cast_parameters, load_model
from qkern.model import memory_footprint, quantize_model
from qkern.module_tree import set_compute
from qkern.training.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qkern.coverage import CoverageReport


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A quantized model, before it gets an adapter.

    Args:
        model: in evaluation mode, on the CPU.
        coverage: which weights were quantized.
        bytes_before: of the model as loaded.
        bytes_after: of the model now.
        was: how it was quantized before; None if it was not.
    """

    model: PreTrainedModel
    coverage: CoverageReport
    bytes_before: int
    bytes_after: int
    was: QuantFormat | None = None


def load_frozen(
    path: str | PathLike[str],
    fmt: QuantFormat,
    *,
    dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> FrozenModel:
    """Load a model and quantize its linear layers; one that is quantized already stays as it is.

    Args:
        path: a model directory or GGUF file.
        fmt: how the frozen weights are stored.
        dtype: of what stays dense, and of what the weights dequantize to; the file's if None.
        compute: "exact" or "int8", see ``qkern.linear``.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        QkernError: its files cannot be used.
    """
    model = load_model(path)
    before, was = memory_footprint(model), _format_of(model)
    coverage = quantize_model(model, fmt, compute=compute)
    if dtype is not None:
        cast_parameters(model, dtype)
    return FrozenModel(model, coverage, before, memory_footprint(model), was)


def check_format(was: QuantFormat | None, fmt: QuantFormat, path: str | PathLike[str]) -> None:
    """Refuse a format that was asked for, where a model has another one already.

    Raises:
        SettingError: naming both.
    """
    if was is not None and (was.quant_type, was.blocksize) != (fmt.quant_type, fmt.blocksize):
        msg = (
            f"{format_name(fmt)} is asked for, but {path} is {format_name(was)} already and stays "
            "so: leave the setting out, or start from the dense model"
        )
        raise SettingError(msg)


def format_name(fmt: QuantFormat) -> str:
    """For people."""
    return fmt.quant_type + (f" in blocks of {fmt.blocksize}" if fmt.template.blocksize else "")


def _format_of(model: torch.nn.Module) -> QuantFormat | None:
    """What most quantized layers have."""
    layers = [layer for layer, _ in quantized_layers(model).values()]
    formats = [layer.quantized_weight.format.template for layer in layers]
    return max(formats, key=formats.count, default=None)


def load_finetuned(
    path: str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    *,
    fmt: QuantFormat | None = None,
    dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> PreTrainedModel:
    """Load a model and the adapter that was trained on it, quantized as it was in training.

    Args:
        path: the base model's directory or GGUF file.
        adapter: the adapter's directory; None for the base model alone.
        fmt: how the frozen weights are stored; what the adapter's file says if None, and nothing
            is quantized if there is no adapter either.
        dtype: as in ``load_frozen``.
        compute: as in ``load_frozen``.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        SettingError: "int8" where no weight is quantized, and for a format where the model has
            another one already.
    """
    own = None if adapter is None else adapters.read_quantization(adapter) or QuantFormat()
    # A format that was asked for gives other bytes than the adapter was trained over.
    force, asked = fmt not in (None, own), fmt
    fmt = own if fmt is None else fmt
    if fmt is None:
        model = load_model(path, dtype=dtype)
        if set_compute(model, compute) == 0 and compute != "exact":
            msg = (
                f"compute is {compute!r}, but no weight of {path} is quantized: name a format "
                "(--quant-type nf4) or an adapter, or leave compute out"
            )
            raise SettingError(msg)
    else:
        frozen = load_frozen(path, fmt, dtype=dtype, compute=compute)
        if asked is not None:
            check_format(frozen.was, asked, path)
        model = frozen.model
    if adapter is not None:
        adapters.load_adapter(model, adapter, force=force)
    model.train(mode=False)
    return model


def resolve_device(name: str) -> torch.device:
    """The device of a setting: "cpu", "cuda", or "auto".

    Raises:
        SettingError: "cuda" without a GPU.
    """
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        msg = (
            "device is 'cuda', but torch sees no GPU: use 'cpu' or 'auto', or look at qkern doctor"
        )
        raise SettingError(msg)
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic: a name, or "auto" for what the machine computes well.

    Raises:
        SettingError: "float16" on a CPU.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        msg = "dtype is 'float16', which does not train on a CPU: use 'bfloat16' or 'float32'"
        raise SettingError(msg)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_compute(compute: str, device: torch.device) -> None:
    """Refuse what the device does not compute, before a model is loaded for it.

    Raises:
        SettingError: "int8" for anything but a CPU.
    """
    if compute != "exact" and device.type != "cpu":
        msg = f"compute is {compute!r}, which is for a CPU, not for {device}: use 'exact' there"
        raise SettingError(msg)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)
