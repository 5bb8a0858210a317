"""How modules and tensors are named, by callers and by models. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(name: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern: itself, its end after a dot, or a glob."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def is_router(path: str, names: Iterable[str]) -> bool:
    """Whether a linear layer chooses experts, by its path and the names in the model.

    Most models have a class of their own for it; some hold an ``nn.Linear``.

    Args:
        path: of the layer.
        names: of all modules, or of all tensors.
    """
    parent, _, last = path.rpartition(".")
    above, _, kind = parent.rpartition(".")
    if "router" in (last, kind):
        return True
    if "gate" not in (last, kind):
        return False
    experts = f"{parent if last == 'gate' else above}.experts".removeprefix(".")
    return any(name == experts or name.startswith(f"{experts}.") for name in names)
