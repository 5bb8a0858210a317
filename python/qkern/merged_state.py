"""A merged adapter in state dicts: whoever loads one knows what its weights hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern.adapter_holder import AdapterHolder
from qkern.errors import StateDictError
from qkern.flat_weight import FlatWeight


class MergedState(AdapterHolder, FlatWeight):
    """Layers whose ``state_dict`` says that the active adapter is in the weight, and which.

    The entry ``merged.<name>`` is there while the adapter of that name is merged. Without it, the
    adapter would be added a second time where the state is loaded, or not at all. Its values are
    the factors that DoRA has multiplied rows by, fp32 (out_features,); (0,) for other kinds.
    """

    _merged_lengths: Tensor | None = None

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            lengths = self._merged_lengths if self.active().use_dora else None
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
        has_weight = f"{prefix}weight" in state_dict
        self._check_entries(state_dict, prefix, entries, has_weight=has_weight)
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(rest, prefix, *args)
        for name, key in entries.items():
            values = state_dict[key]
            self.active_adapter, self.merged = name, True
            self._merged_lengths = values.detach().clone() if values.numel() else None
        if has_weight and not entries:
            self.merged, self._merged_lengths = False, None

    def _check_entries(
        self, state: dict[str, Any], prefix: str, entries: dict[str, str], *, has_weight: bool
    ) -> None:
        """Refuse what would leave the layer with an adapter twice, or with half of it.

        Raises:
            StateDictError: saying which entry, and what to do.
        """
        unknown = [name for name in entries if name not in self.adapters]
        if unknown:
            msg = (
                f"{entries[unknown[0]]}: the weight holds adapter {unknown[0]!r}, the layer has "
                f"{sorted(self.adapters)}: give it that adapter first (add_lora, adapter_name=)"
            )
            raise StateDictError(msg)
        if len(entries) > 1 or (entries and not has_weight):
            msg = (
                f"{', '.join(entries.values())}: expected one merged adapter and the weight that "
                f"holds it, {prefix}weight"
            )
            raise StateDictError(msg)
        mine = f"{prefix}adapters.{self.active_adapter}."
        if self.merged and not has_weight and any(key.startswith(mine) for key in state):
            msg = (
                f"{mine}*: the adapter is merged into the weight, which the state has not: call "
                "unmerge_adapter before other values are loaded"
            )
            raise StateDictError(msg)

    def _merged_key(self) -> str:
        return f"merged.{self.active_adapter}"

    def _flat_keys(self) -> set[str]:
        keys = super()._flat_keys()
        return keys | {self._merged_key()} if self.merged else keys
