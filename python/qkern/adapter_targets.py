"""Which layers, and weights of experts, get an adapter: by names, as PEFT reads them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from qkern.adapted import quantized_experts, quantized_layers
from qkern.errors import AdapterMismatchError, FormatError


def find_targets(
    model: nn.Module, target_modules: str | Sequence[str], target_parameters: Sequence[str] = ()
) -> list[str]:
    """The paths of the quantized layers, and of the weights of experts, that are meant.

    Args:
        model: after ``quantize_model``; on meta too.
        target_modules: see ``add_lora``.
        target_parameters: the same.

    Raises:
        AdapterMismatchError: for a name that matches nothing, with the nearest ones.
        FormatError: for what is no regular expression, and for no list of ``target_parameters``.
    """
    layers, experts = quantized_layers(model), quantized_experts(model)
    if target_modules or not target_parameters:
        _check_targets(target_modules, list(layers))
    names = [name for name in layers if _is_target(name, target_modules)]
    return names + _experts_of(target_parameters, list(experts))


def _check_targets(targets: str | Sequence[str], names: list[str]) -> None:
    """Refuse a target that matches no layer, naming the nearest ones."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    unmatched = [
        target
        for target in wanted
        if not any(
            _is_target(name, target if isinstance(targets, str) else [target]) for name in names
        )
    ]
    if wanted and not unmatched:
        return
    found = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(unmatched[0], [*found, *names], n=3) if unmatched else []
    msg = (
        f"target_modules={targets!r}: {', '.join(map(repr, unmatched)) or 'nothing'} matches no "
        f"quantized layer; nearest: {', '.join(near) or 'none'}; quantized are: "
        f"{', '.join(found) or 'none (call quantize_model first)'}"
    )
    raise AdapterMismatchError(msg)


def _experts_of(targets: Sequence[str], names: list[str]) -> list[str]:
    """The weights of experts that ``target_parameters`` names; each of them must be of use."""
    if isinstance(targets, str):
        msg = f"target_parameters={targets!r}: a list of names is needed, no expression"
        raise FormatError(msg)
    for target in targets:
        if not any(_is_target(name, [target]) for name in names):
            ends = sorted({".".join(name.split(".")[-2:]) for name in names})
            msg = (
                f"target_parameters: {target!r} matches no quantized weight of stacked experts; "
                f"nearest: {', '.join(difflib.get_close_matches(target, ends)) or 'none'}; there "
                f"are: {', '.join(ends) or 'none (call quantize_model first, see its report)'}"
            )
            raise AdapterMismatchError(msg)
    return [name for name in names if _is_target(name, list(targets))]


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            msg = (
                f"target_modules={targets!r} is no regular expression ({error}): give names and "
                f"ends of paths as a list, [{targets!r}]"
            )
            raise FormatError(msg) from error
    return any(name == target or name.endswith(f".{target}") for target in targets)
