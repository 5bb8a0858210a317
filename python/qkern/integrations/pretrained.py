"""Open a model directory: dense safetensors, GGUF (through transformers), or quantized."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qkern.checkpoint.load import is_quantized, load_into
from qkern.checkpoint.load_dense import load_dense_into
from qkern.codec import COMPUTE, check_choice, check_method
from qkern.errors import CorruptFileError, FormatError, MissingDependencyError
from qkern.files import read_json
from qkern.formats import QuantFormat, resolve_format
from qkern.integrations.expert_names import pieces_of
from qkern.module_tree import set_compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compute: str | None = None,
    quant_type: str | QuantFormat | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    exclude: str | Sequence[str] = (),
    min_coverage: float | None = None,
) -> nn.Module:
    """A checkpoint as a quantized model, ready to run; with its adapter if there is one.

    Files are mapped, not read into memory: of a quantized weight its 4 or 8 bits go to ``device``.
    With ``quant_type`` a dense checkpoint is quantized on the host, weight by weight, on the way
    there, as ``quantize_model`` would: the dense model is never in memory.

    Args:
        path: a directory that ``qkern.save``, ``qkern.quantize_checkpoint`` or transformers with
            bitsandbytes wrote; with ``quant_type`` a dense one.
        model: to load into, of the same architecture (of a dense checkpoint, on meta); built from
            ``config.json`` by transformers if None.
        device: where to put it.
        dtype: of the dense parameters and of what quantized ones dequantize to; that of the file
            if None.
        compute: "exact" or "int8", see ``qkern.linear``; files do not say. None: "exact", but for
            quantized layers that ``model`` has already.
        quant_type: how to quantize a dense checkpoint, see ``quantize_model``, as the rest:
        blocksize: values that share a scale.
        double_quant: store the scales in 8 bits.
        method: "absmax" or "search".
        exclude: what stays dense.
        min_coverage: least share of the values that must be quantized, 0 to 1.

    Raises:
        FormatError: for another ``compute`` or format, or ``quant_type`` for files that are
            quantized already.
        CoverageError: if less than ``min_coverage`` was quantized.
        FileNotFoundError: if a file is missing.
        CorruptFileError: if the files contradict the model or each other.
        MissingDependencyError: if transformers is needed and not installed.
    """
    if compute is not None:
        check_choice("compute", compute, COMPUTE)
    directory = Path(path)
    fmt = None
    if quant_type is not None:
        fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
        check_method(method, fmt, has_importance=False)
        if is_quantized(directory):
            msg = f"{directory} is quantized already: load it without quant_type"
            raise FormatError(msg)
    built = _empty_model(directory) if model is None else model
    if fmt is None:
        load_into(built, directory, names=pieces_of)
    else:
        how: dict[str, Any] = {"exclude": exclude, "method": method, "device": device}
        how["names"] = pieces_of
        report = load_dense_into(built, directory, fmt, **how)
        if min_coverage is not None:
            report.check(min_coverage)
    if compute is not None:
        set_compute(built, compute)
    if dtype is not None:
        cast_parameters(built, dtype)
    built = built if device is None else built.to(device)
    return built.eval() if model is None else built


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters a dtype in place, but for adapters; buffers keep theirs.

    A buffer can be a table that lower precision ruins, as the rotary frequencies are.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B", ".lora_magnitude")):
            parameter.data = parameter.data.to(dtype)


def load_model(path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model from a directory or a GGUF file, dense or quantized as it is there.

    Args:
        path: a directory with ``config.json`` and safetensors, or one that holds a single GGUF
            file, or such a file.
        dtype: of the dense parameters; that of the file if None.

    Raises:
        FileNotFoundError: if there is no model at ``path``.
        CorruptFileError: if a directory holds several GGUF files.
    """
    transformers = _import("transformers")
    directory, gguf = _resolve(path)
    if gguf is None and is_quantized(directory):
        return load(directory, dtype=dtype)  # type: ignore[return-value]
    arguments: dict[str, Any] = {"dtype": dtype or "auto", "local_files_only": True}
    if gguf is not None:
        arguments |= {"gguf_file": gguf, "dtype": dtype or torch.float32}
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        directory, **arguments
    )
    if gguf is not None:
        _forget_gguf(model)
    model.train(False)
    return model


def empty_model(path: str | PathLike[str]) -> nn.Module:
    """The model that ``load_model`` would load, dense and on meta: what its modules are called.

    Args:
        path: as for ``load_model``; of a GGUF file its metadata is read alone.

    Raises:
        FileNotFoundError: if there is no model at ``path``.
        CorruptFileError: if its files cannot be used.
    """
    directory, gguf = _resolve(path)
    if gguf is None and is_quantized(directory):
        return _empty_model(directory)
    transformers = _import("transformers")
    arguments = {} if gguf is None else {"gguf_file": gguf}
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **arguments)
    with _import("accelerate").init_empty_weights(include_buffers=False):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def load_tokenizer(path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or GGUF file."""
    directory, gguf = _resolve(path)
    arguments = {} if gguf is None else {"gguf_file": gguf}
    tokenizer: PreTrainedTokenizerBase = _import("transformers").AutoTokenizer.from_pretrained(
        directory, local_files_only=True, **arguments
    )
    return tokenizer


def _forget_gguf(model: Any) -> None:
    """Take back transformers' mark of a quantized model: read from GGUF, its weights are dense."""
    vars(model).update(is_quantized=False, hf_quantizer=None)
    vars(model.config).pop("quantization_config", None)


def _resolve(path: str | PathLike[str]) -> tuple[Path, str | None]:
    """The directory of a model, and the name of its GGUF file if that is what it holds."""
    place = Path(path)
    if place.is_file() and place.suffix == ".gguf":
        return place.parent, place.name
    if not place.is_dir():
        msg = f"there is no model directory {place} (models are not downloaded)"
        raise FileNotFoundError(msg)
    if any(place.glob("*.safetensors")):
        return place, None
    ggufs = sorted(file.name for file in place.glob("*.gguf"))
    if len(ggufs) > 1:
        msg = f"{place} holds {len(ggufs)} GGUF files: name one, e.g. {place / ggufs[0]}"
        raise CorruptFileError(msg)
    if not ggufs:
        msg = f"{place} holds neither safetensors nor GGUF weights"
        raise FileNotFoundError(msg)
    return place, ggufs[0]


def _empty_model(directory: Path) -> nn.Module:
    """The architecture of ``config.json`` with its parameters on meta, its buffers real."""
    _check_config(directory)
    transformers = _import("transformers")
    content = read_json(directory / "config.json")
    content.pop("quantization_config", None)
    names = content.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if "model_type" not in content or not (is_model or not names):
        msg = f"{directory / 'config.json'}: architectures={names} names no transformers model"
        raise CorruptFileError(msg)
    config = transformers.AutoConfig.for_model(**content)
    # Files without architectures hold what most models of a type are made for.
    build = transformers.AutoModelForCausalLM.from_config if cls is None else cls
    # Buffers are computed, not loaded (rotary tables): they must be real.
    with _import("accelerate").init_empty_weights(include_buffers=False):
        model: nn.Module = build(config)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def _check_config(directory: Path) -> None:
    if (directory / "config.json").is_file():
        return
    found = f"there is no model directory {directory} (models are not downloaded)"
    if directory.is_dir():
        found = f"{directory} holds no config.json"
    elif directory.exists():
        found = f"{directory} is a file, not the directory of a model"
    msg = (
        f"{found}: a model is a directory with config.json and safetensors files, as qkern.save, "
        "qkern quantize or save_pretrained writes it; without config.json, pass model="
    )
    raise FileNotFoundError(msg)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        msg = f'this needs {name}: pip install "qkern[train]"'
        raise MissingDependencyError(msg) from error
