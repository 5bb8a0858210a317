"""A merged adapter in state dicts: whoever loads one knows what its weights hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern.adapter_holder import NamedAdapters
from qkern.errors import StateDictError
from qkern.flat_weight import FlatParameters


class MergedState(NamedAdapters, FlatParameters):
    """Layers and experts whose ``state_dict`` says that an adapter is in the weights, and which.

    The entry ``merged.<name>`` is there while the adapter of that name is merged, into all weights
    that it has a part in. Without it, the adapter would be added a second time where the state is
    loaded, or not at all. Its values are the factors that DoRA has multiplied rows by, fp32
    (out_features,); (0,) for other kinds.
    """

    _merged_lengths: Tensor | None = None

    def weights_of_adapter(self, name: str | None) -> list[str]:
        """The parameters that an adapter of the module has a part in: of a layer, its weight."""
        return [] if name is None else ["weight"]

    def set_merged(self, name: str | None) -> None:
        """Take it that this adapter is in the weights; None for none."""
        self.merged = name is not None
        self.active_adapter = self.active_adapter if name is None else name

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            adapter = self.adapters[str(self.active_adapter)]
            lengths = self._merged_lengths if getattr(adapter, "use_dora", False) else None
            found = torch.empty(0) if lengths is None else lengths.detach()
            destination[f"{prefix}{self._merged_key()}"] = found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,
    ) -> None:
        start = f"{prefix}merged."
        entries = {key.removeprefix(start): key for key in state_dict if key.startswith(start)}
        has_weights = self._check_entries(state_dict, prefix, entries)
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(rest, prefix, *args)
        if has_weights:
            name = next(iter(entries), None)
            values = torch.empty(0) if name is None else state_dict[entries[name]]
            self.set_merged(name)
            self._merged_lengths = values.detach().clone() if values.numel() else None

    def _check_entries(self, state: dict[str, Any], prefix: str, entries: dict[str, str]) -> bool:
        """Refuse what would leave the module with an adapter twice, or with half of it.

        Returns:
            Whether the state has the weights that an adapter is in: there, or here.

        Raises:
            StateDictError: saying which entry, and what to do.
        """
        unknown = [name for name in entries if name not in self.adapters]
        if unknown:
            msg = (
                f"{entries[unknown[0]]}: the weight holds adapter {unknown[0]!r}, the module has "
                f"{sorted(self.adapters)}: give it that adapter first (add_lora, adapter_name=)"
            )
            raise StateDictError(msg)
        here = self.weights_of_adapter(self.active_adapter) if self.merged else []
        there = [key for name in entries for key in self.weights_of_adapter(name)]
        weights = list(dict.fromkeys(f"{prefix}{key}" for key in (*here, *there)))
        missing = [key for key in weights if key not in state]
        if len(entries) > 1 or (entries and missing):
            msg = (
                f"{', '.join(entries.values())}: expected one merged adapter and the weight that "
                f"holds it, {', '.join(weights)}"
            )
            raise StateDictError(msg)
        mine = f"{prefix}adapters.{self.active_adapter}."
        if missing and (len(missing) < len(weights) or any(key.startswith(mine) for key in state)):
            msg = (
                f"{mine}*: the adapter is merged into {', '.join(missing)}, which the state has "
                "not: call unmerge_adapter before other values are loaded"
            )
            raise StateDictError(msg)
        return bool(weights) and not missing

    def _merged_key(self) -> str:
        return f"merged.{self.active_adapter}"

    def _flat_keys(self) -> set[str]:
        keys = super()._flat_keys()
        return keys | {self._merged_key()} if self.merged else keys
