"""What transformers calls a model's tensors in files, where it is not what the model calls them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qkern.checkpoint.stacking import Piece, Pieces

# Steps of transformers that stack experts as ``restack`` does: all on dim 0, gate before up on 1.
_STACKS = ((("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1)))


def pieces_of(model: nn.Module, names: Iterable[str]) -> Pieces:
    """Where the tensors of a file go that has transformers' names for them.

    Empty for other models, and for versions of transformers that rename nothing: before 5.

    Args:
        model: of transformers.
        names: of the dense tensors in the file.
    """
    rules = _rules(model)
    own = {*model.state_dict(keep_vars=True)}
    found: dict[str, Piece] = {}
    renamings = [rule for rule in rules if not hasattr(rule, "operations")]
    converters = [rule for rule in rules if hasattr(rule, "operations")]
    for name in names if rules else ():
        if name in own:
            continue
        renamed = name
        for rule in renamings:
            renamed = rule.rename_source_key(renamed)[0]
        piece = Piece(renamed)
        for rule in converters:
            target, pattern = rule.rename_source_key(renamed)
            if pattern is not None:
                piece = _stacked(rule, target, pattern, renamed) or Piece(name)
                break
        if piece.target != name:
            found[name] = piece
    return found


def _rules(model: nn.Module) -> list[Any]:
    """Transformers' own, in their order."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        base = importlib.import_module("transformers").PreTrainedModel
    except ModuleNotFoundError:
        return []
    find = getattr(mapping, "get_model_conversion_mapping", None)
    if find is None or not isinstance(model, base):
        return []
    rules: list[Any] = find(model)
    return rules


def _stacked(rule: Any, target: str, pattern: str, name: str) -> Piece | None:
    """The piece that a converter makes of a tensor; None if it does something else than stack."""
    steps = tuple((type(step).__name__, getattr(step, "dim", None)) for step in rule.operations)
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if steps not in _STACKS or number is None:
        return None
    return Piece(target, int(number[1]), rule.source_patterns.index(pattern))
