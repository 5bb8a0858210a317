"""Which parameters of a model the tensors of a checkpoint are, as transformers will decide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Renaming:
    """What transformers does to the names of a checkpoint.

    Args:
        model: on meta.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, Tensor] = model.state_dict()

    def renamed(self, name: str) -> str:
        """Before the base model's prefix is added or taken off."""
        renamed, _ = rename_source_key(name, self._renamings, [])
        return renamed

    def parameter(self, name: str) -> str:
        """The parameter that has a tensor's value as it is stored; maybe none of the model's."""
        key, _ = rename_source_key(name, self._renamings, [], self._prefix, self.state)
        return key

    def prefixed(self, name: str) -> str:
        """A name after renaming, with the base model's prefix added or taken off."""
        key, _ = rename_source_key(name, [], [], self._prefix, self.state)
        return key

    def parameters(self, name: str) -> list[str]:
        """All parameters that a tensor is a part of, conversions included."""
        key, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self.state
        )
        for entry in self._converters:
            if pattern in entry.source_patterns:
                first = entry.target_patterns[0]
                return [key.replace(first, target) for target in entry.target_patterns]
        return [key if key in self.state else self.parameter(name)]


def stored_names(model: PreTrainedModel, files: Sequence[str]) -> set[str]:
    """The parameters of a model that get values of these files, safetensors or torch's own."""
    renaming = Renaming(model)
    return {key for file in files for name in _keys(file) for key in renaming.parameters(name)}


def _keys(file: str) -> list[str]:
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    # On meta the values are not read.
    return list(torch.load(file, map_location="meta", weights_only=True))
