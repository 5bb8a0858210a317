"""Modules that hold ``QuantizedTensor``s, in state dicts: flat keys, loaded strictly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qkern import flat_keys, shards
from qkern.errors import FormatError, QkernError, StateDictError
from qkern.tensor import QuantizedTensor


class FlatParameters(nn.Module):
    """A module some of whose parameters are quantized, in state dicts.

    They are written under bitsandbytes' flat keys. Each is taken back whole and of the same format,
    or not at all; the module's other parameters are as in every module.
    """

    def quantized_names(self) -> list[str]:
        """Names of the parameters that are quantized."""
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter is not None and isinstance(shards.local_part(parameter), QuantizedTensor)
        ]

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        # Only read: another thread may compute with the module meanwhile.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.quantized_names():
            destination.pop(f"{prefix}{name}")
            destination.update(shards.entries(self._parameters[name], f"{prefix}{name}"))

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
        names = self.quantized_names()
        owned = {name: flat_keys.owned_keys(state_dict, f"{prefix}{name}") for name in names}
        elsewhere = {key for keys in owned.values() for key in keys}
        rest = {k: v for k, v in state_dict.items() if k not in elsewhere}
        held = self._set_apart()
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._put_together(held)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        for name in names:
            entries = {key: state_dict[key] for key in owned[name]}
            key, mine = f"{prefix}{name}", shards.local_part(self._parameters[name])
            missing = flat_keys.missing_keys(entries, key, mine.format)
            if missing and not entries:
                missing_keys += missing
                continue
            if missing:  # never half of the file and half of what was there, strict or not
                msg = (
                    f"{key}: expected {mine.format.quant_type} codes with their scales, missing "
                    f"{', '.join(missing)}, found only {', '.join(entries)}; dense weights are "
                    "loaded into a dense model, then quantized, or given to the layer's "
                    f"{name}.assign()"
                )
                raise StateDictError(msg)
            if strict:
                known = flat_keys.known_keys(mine, key)
                unexpected_keys += [k for k in entries if k not in known]
            try:
                self._load_one(name, entries, key, assign=assign)
            except QkernError as error:
                raise StateDictError(str(error)) from error

    def _set_apart(self) -> dict[str, Any]:
        """Leave the module without its quantized parameters; all of them, in their order."""
        held, names = dict(self._parameters), set(self.quantized_names())
        self._parameters = {k: v for k, v in held.items() if k not in names}
        return held

    def _put_together(self, held: dict[str, Any]) -> None:
        self._parameters = {k: self._parameters.get(k, v) for k, v in held.items()}

    def _load_one(self, name: str, entries: dict[str, Any], key: str, *, assign: bool) -> None:
        mine: Any = self._parameters[name]
        if shards.is_sharded(mine):
            shards.load(mine, entries, key)
            return
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
                setattr(self, name, nn.Parameter(loaded, requires_grad=False))
            elif loaded.format == mine.format:
                mine.copy_(loaded.to(mine.dtype))
                mine.undo.clear()
            else:  # 8-bit scales on one side, fp32 on the other
                mine.data = loaded.to(device=mine.device, dtype=mine.dtype)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For ``torch.distributed.checkpoint``: the keys of a weight are no submodules."""
        return {key.partition(".")[0]: "_flat_names" for key in self._flat_keys()}

    def _flat_keys(self) -> set[str]:
        return {
            key
            for name in self.quantized_names()
            for key in flat_keys.known_keys(shards.local_part(self._parameters[name]), name)
        }

    @property
    def _flat_names(self) -> SimpleNamespace:
        names = SimpleNamespace()
        for key in self._flat_keys():
            at = names
            for name in key.split("."):
                if not hasattr(at, name):
                    setattr(at, name, SimpleNamespace())
                at = getattr(at, name)
        return names


class FlatWeight(FlatParameters):
    """The same of a module whose one quantized parameter is its ``weight``."""

    weight: nn.Parameter

    def quantized_names(self) -> list[str]:
        """The weight, and nothing else."""
        return ["weight"]

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight, with its type."""
        return self.weight  # type: ignore[return-value]
