"""A module whose weight is a ``QuantizedTensor``, in state dicts: flat keys, loaded strictly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qkern import flat_keys, shards
from qkern.errors import FormatError, QkernError, StateDictError
from qkern.tensor import QuantizedTensor


class FlatWeight(nn.Module):
    """What ``QuantizedLinear`` adds to the ``state_dict`` of an ``nn.Linear``.

    The weight is written under bitsandbytes' flat keys. It is taken back whole and of the same
    format, or not at all; the module's other parameters are as in every module.
    """

    weight: nn.Parameter

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight, with its type."""
        return self.weight  # type: ignore[return-value]

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        weight = self._parameters.pop("weight")
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = {"weight": weight, **self._parameters}
        destination.update(shards.entries(weight, f"{prefix}weight"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 - torch's signature
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        owned = flat_keys.owned_keys(state_dict, key)
        rest = {k: v for k, v in state_dict.items() if k not in set(owned)}
        weight = self._parameters.pop("weight")
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters = {"weight": weight, **self._parameters}
        fmt = shards.local_part(weight).format
        missing = flat_keys.missing_keys(state_dict, key, fmt)
        if missing and not owned:
            missing_keys += missing
            return
        if missing:  # never half of the file and half of what was there, strict or not
            msg = (
                f"{key}: expected {fmt.quant_type} codes with their scales, missing "
                f"{', '.join(missing)}, found only {', '.join(owned)}; dense weights are loaded "
                "into a dense model, then quantized, or given to the layer's weight.assign()"
            )
            raise StateDictError(msg)
        if strict:
            known = flat_keys.known_keys(shards.local_part(weight), key)
            unexpected_keys += [k for k in owned if k not in known]
        try:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            self._load_weight({k: state_dict[k] for k in owned}, key, assign=assign)
        except QkernError as error:
            raise StateDictError(str(error)) from error

    def _load_weight(self, entries: dict[str, Any], key: str, *, assign: bool) -> None:
        weight = self.weight
        if shards.is_sharded(weight):
            shards.load(weight, entries, key)
            return
        mine = self.quantized_weight
        loaded = flat_keys.unflatten(entries, key, mine.dtype)
        same = loaded.format.replace(double_quant=False) == mine.format.replace(double_quant=False)
        if loaded.shape != mine.shape or not same:
            msg = (
                f"{key}: the file holds {tuple(loaded.shape)} {loaded.format}, "
                f"the module {tuple(mine.shape)} {mine.format}"
            )
            raise FormatError(msg)
        with torch.no_grad():
            if assign or mine.is_meta:
                if not assign:
                    msg = f"{key}: the module is on meta: pass assign=True"
                    raise FormatError(msg)
                self.weight = nn.Parameter(loaded, requires_grad=False)
            elif loaded.format == mine.format:
                mine.copy_(loaded.to(mine.dtype))
                mine.undo.keep(None)
            else:  # 8-bit scales on one side, fp32 on the other
                mine.data = loaded.to(device=mine.device, dtype=mine.dtype)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For ``torch.distributed.checkpoint``: the keys of the weight are no submodules."""
        return {key.partition(".")[0]: "_flat_names" for key in self._weight_keys()}

    def _weight_keys(self) -> set[str]:
        return flat_keys.known_keys(shards.local_part(self.weight), "weight")

    @property
    def _flat_names(self) -> SimpleNamespace:
        names = SimpleNamespace()
        for key in self._weight_keys():
            at = names
            for name in key.split("."):
                if not hasattr(at, name):
                    setattr(at, name, SimpleNamespace())
                at = getattr(at, name)
        return names
