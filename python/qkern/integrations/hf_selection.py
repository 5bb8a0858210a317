"""Which layers of a transformers model are quantized: qkern's rules, its class's, and a user's."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from qkern.coverage import CoverageReport
from qkern.errors import FormatError
from qkern.formats import QuantFormat
from qkern.integrations.hf_names import stored_names
from qkern.model import quantize_model
from qkern.name_patterns import matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize_empty(
    model: PreTrainedModel,
    fmt: QuantFormat,
    patterns: Sequence[str],
    files: Sequence[str] | None = None,
) -> CoverageReport:
    """Replace the layers of a model on meta as ``qkern.quantize_model`` does.

    Args:
        model: on meta.
        fmt: of the quantized layers.
        patterns: of the user, see ``QkernConfig``.
        files: of the checkpoint; None where weights come from elsewhere.

    Returns:
        What will be quantized, and why the rest will not.

    Raises:
        FormatError: if a pattern matches no module.
    """
    reasons = _new(model, files) | _tied(model) | _kept_in_float32(model)
    reasons |= _chosen(model, patterns)
    exclude = {_exactly(name): reason for name, reason in reasons.items()}
    report = quantize_model(model, fmt, exclude=list(exclude))
    rows = (
        dataclasses.replace(row, reason=reasons[row.name])
        if row.status == "dense" and row.name in reasons
        else row
        for row in report.rows
    )
    return CoverageReport(tuple(rows))


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _new(model: PreTrainedModel, files: Sequence[str] | None) -> dict[str, str]:
    """Layers whose weights the checkpoint lacks: transformers initializes them, to be trained."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        return {}
    found = stored_names(model, files)
    reason = "the checkpoint has no such weight: it is new, to be trained"
    return {name: reason for name in _linear(model) if f"{name}.weight" not in found}


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Layers that get their weight from another module when all weights are read."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    linear = set(_linear(model))
    reasons = {}
    for target, owner in tied.items():
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
    names = [name for name, _ in model.named_modules()]
    reasons: dict[str, str] = {}
    linear = _linear(model)
    for pattern in patterns:
        if not any(_is_meant(name, pattern) for name in names):
            msg = (
                f"modules_to_not_convert={pattern!r} matches no module of {type(model).__name__}: "
                "paths, beginnings or ends of paths, and globs do"
            )
            raise FormatError(msg)
        reason = f"modules_to_not_convert has {pattern!r}"
        reasons |= {name: reason for name in linear if _is_meant(name, pattern)}
    return reasons


def _is_meant(name: str, pattern: str) -> bool:
    return matches(name, pattern) or name.startswith(f"{pattern}.")


def _exactly(name: str) -> str:
    """A pattern of ``quantize_model`` for this path alone, not for longer ones that end so."""
    return f"[{name[0]}]{glob.escape(name[1:])}"
