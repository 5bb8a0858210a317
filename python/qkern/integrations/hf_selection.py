"""Which layers of a transformers model are quantized: qkern's rules, its class's, and a user's."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from qkern import experts
from qkern.coverage import CoverageReport, CoverageRow
from qkern.errors import FormatError
from qkern.formats import QuantFormat
from qkern.integrations.hf_names import stored_names
from qkern.model import quantize_model
from qkern.module_tree import module_paths
from qkern.name_patterns import matches
from qkern.weight_sites import called, is_linear, output_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize_empty(
    model: PreTrainedModel,
    fmt: QuantFormat,
    patterns: Sequence[str],
    files: Sequence[str] | None = None,
    *,
    plain: bool = False,
) -> CoverageReport:
    """Replace the modules of a model on meta as ``qkern.quantize_model`` does.

    Args:
        model: on meta.
        fmt: of the quantized layers.
        patterns: of the user, see ``QkernConfig``.
        files: of the checkpoint; None where weights come from elsewhere.
        plain: whether bitsandbytes is to open what is saved: it has no stacked experts.

    Returns:
        What will be quantized, and why the rest will not.

    Raises:
        FormatError: if a pattern matches no module.
    """
    reasons = _new(model, files) | _tied(model) | _kept_in_float32(model)
    if plain:
        reason = "save_as='bitsandbytes', which has no stacked experts"
        reasons |= {n: reason for n, m in model.named_modules() if experts.is_experts(m)}
    reasons |= _chosen(model, patterns)
    exclude = {_exactly(name): reason for name, reason in reasons.items()}
    report = quantize_model(model, fmt, exclude=list(exclude))
    tied = {name.removesuffix(".weight") for name in tied_keys(model)}
    return CoverageReport(tuple(_finished(row, reasons, tied) for row in report.rows))


def _finished(row: CoverageRow, reasons: dict[str, str], tied: set[str]) -> CoverageRow:
    """A row with the reason for what was excluded; what shares a weight counts once."""
    if row.name in tied:
        row = dataclasses.replace(row, numel=0, bytes_before=0, bytes_after=0)
    # A row is called as its module where its parameter is "weight".
    module = row.name if row.name in reasons else row.name.rpartition(".")[0]
    if row.status != "dense" or module not in reasons or not row.reason.startswith("excluded"):
        return row
    return dataclasses.replace(row, reason=reasons[module])


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def _weights(module: nn.Module) -> tuple[str, ...]:
    return experts.weight_names(module) if experts.is_experts(module) else ("weight",)


def _new(model: PreTrainedModel, files: Sequence[str] | None) -> dict[str, str]:
    """Layers whose weights the checkpoint lacks: transformers initializes them, to be trained."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        return {}
    have = stored_names(model, files) | tied_keys(model).keys()
    reason = "the checkpoint has no such weight: it is new, to be trained"
    return {
        name: reason
        for name in _linear(model)
        if any(f"{name}.{key}" not in have for key in _weights(model.get_submodule(name)))
    }


def tied_keys(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter that is another one when all weights are read: that one."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Layers that get their weight from another module when all weights are read."""
    # Those that make logits stay dense anyway, and say so.
    heads = output_heads(model)
    linear = {name for name in _linear(model) if id(model.get_submodule(name)) not in heads}
    reasons = {}
    for target, owner in tied_keys(model).items():
        for name, other in ((target, owner), (owner, target)):
            module = name.rpartition(".")[0]
            if module in linear:
                reasons[module] = f"shares its weight with {other.rpartition('.')[0]}"
    return reasons


def _kept_in_float32(model: PreTrainedModel) -> dict[str, str]:
    """Layers that the model's class computes in float32, whatever the others have."""
    patterns = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    reason = "its class computes it in float32 where the rest is float16"
    return {name: reason for name in _linear(model) if not should_convert_module(name, patterns)}


def _chosen(model: PreTrainedModel, patterns: Sequence[str]) -> dict[str, str]:
    # What each module may be called by.
    names = {paths[0]: {*paths, *called(module, paths)} for module, paths in module_paths(model)}
    every = set().union(*names.values())
    reasons: dict[str, str] = {}
    linear = {
        name: {above for n in names[name] for above in _upwards(n)} for name in _linear(model)
    }
    for pattern in patterns:
        meant = {name for name in every if matches(name, pattern)}
        if not meant:
            msg = (
                f"modules_to_not_convert={pattern!r} matches no module of {type(model).__name__}: "
                "paths, ends of paths, and globs do"
            )
            raise FormatError(msg)
        reason = f"modules_to_not_convert has {pattern!r}"
        reasons |= {name: reason for name, places in linear.items() if places & meant}
    return reasons


def _upwards(name: str) -> Iterator[str]:
    """A path, and those of the modules that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _exactly(name: str) -> str:
    """A pattern of ``quantize_model`` for this path alone, not for longer ones that end so."""
    return f"[{name[0]}]{glob.escape(name[1:])}"
