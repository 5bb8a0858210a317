"""Stacked experts with trainable adapters: each expert of a weight has an A and a B of its own.

    y_e = x_e W_e^T + bias_e + scaling (x_e A_e^T) B_e^T        for the rows of expert e

with the adapter that is active, of those that the module holds by name; one may have a part in one
of the weights, or in both. The operator multiplies packed bytes and factors: no dense weight is
made. It is what PEFT computes for ``target_parameters``, which adds ``scaling B A`` to W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkern import shards
from qkern.derived_class import derive
from qkern.errors import AdapterMismatchError, FormatError, ShapeError, StateDictError
from qkern.experts import QuantizedExperts, is_transposed, weight_names
from qkern.lora_adapter import PLAIN_INITS, LoRAAdapter, check_name
from qkern.merged_state import MergedState
from qkern.tensor import QuantizedTensor


class QLoRAExperts(MergedState, QuantizedExperts):
    """What the first adapter makes of ``QuantizedExperts``; again an instance of the model's class.

    ``forward`` stays the one below, which hooks that know it go on calling.

    Attributes:
        adapters: by name, and in each a ``LoRAAdapter`` by the name of the weight it is of.
        merged_names: weights that an adapter is merged into.
    """

    _derived_prefix = "QLoRA"
    merged_names: tuple[str, ...] = ()

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether an adapter is in one of the weights."""
        return bool(self.merged_names)

    def adapters_of(self, name: str | None) -> dict[str, LoRAAdapter]:
        """The parts of an adapter, by weight; empty if there is none of that name."""
        held: Any = self.adapters._modules.get(name)  # type: ignore[arg-type]
        return {} if held is None else dict(held.items())

    def weights_of_adapter(self, name: str | None) -> list[str]:
        """The stacked weights that an adapter has a part in."""
        return list(self.adapters_of(name))

    def set_merged(self, name: str | None) -> None:
        """Take it that this adapter is in its weights; None for none."""
        self.merged_names = tuple(self.weights_of_adapter(name))
        self.active_adapter = self.active_adapter if name is None else name

    def _check_entries(self, state: dict[str, Any], prefix: str, entries: dict[str, str]) -> bool:
        has_weights = super()._check_entries(state, prefix, entries)
        for name, key in entries.items():
            start, mine = f"{prefix}adapters.{name}.", self.weights_of_adapter(name)
            found = {k.removeprefix(start).partition(".")[0] for k in state if k.startswith(start)}
            if found and found != set(mine):  # merged there into weights that it is not here
                msg = (
                    f"{key}: the adapter has a part in {', '.join(sorted(found))}, here in "
                    f"{', '.join(sorted(mine))}: give it the same ones (add_lora, "
                    "target_parameters=)"
                )
                raise StateDictError(msg)
        return has_weights

    def _multiply(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, LoRAAdapter],
    ) -> Tensor:
        if self.merged:
            self._check_merged()
            return super()._multiply(hidden_states, top_k_index, top_k_weights, adapters)
        inputs = (hidden_states, top_k_index, top_k_weights)
        if not self.has_rows():
            return super()._multiply(*inputs, self.adapters_of(self.active_adapter))
        multiply = super()._multiply

        def apply(rows: Tensor, name: str | None) -> Tensor:
            chosen = (hidden_states[rows], top_k_index[rows], top_k_weights[rows])
            return multiply(*chosen, self.adapters_of(name))

        tokens = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        y: Tensor = self.by_rows(tokens, apply)
        return y

    def _check_dense(self) -> None:
        used = [self.active_adapter] if self.rows is None else [*self.rows]
        if not self.merged and any(self.adapters_of(name) for name in used):
            msg = (
                f"{self._name()} has an adapter of qkern's own, and a weight that something else "
                "computes (PEFT's target_parameters?): use one of the two"
            )
            raise AdapterMismatchError(msg)

    def _check_merged(self) -> None:
        held = self.adapters_of(self.active_adapter).values()
        if self.training and torch.is_grad_enabled() and any(a.lora_B.requires_grad for a in held):
            msg = (
                f"{self._name()} is in training with a merged adapter, which would learn nothing: "
                "call unmerge_adapter before training, or model.eval() after it"
            )
            raise AdapterMismatchError(msg)

    def drop_adapters(self) -> None:
        """Make it ``QuantizedExperts`` again, in place."""
        for name in ("active_adapter", "merged_names", "rows", "_seen_rows", "_merged_lengths"):
            vars(self).pop(name, None)
        del self._modules["adapters"]
        derive(self, QuantizedExperts)


class ExpertWeight:
    """One weight of quantized experts, with what merging and files ask of a layer with adapters.

    It holds nothing itself.

    Args:
        experts: that it is of.
        parameter: its name there.
    """

    # What a layer may have and experts have not.
    merge_into = None
    lora_mode = "separate"

    def __init__(self, experts: QuantizedExperts, parameter: str) -> None:
        self.experts, self.parameter = experts, parameter

    @property
    def weight(self) -> nn.Parameter:
        """(experts, ..., ...), as the module holds it."""
        return self.experts._parameters[self.parameter]  # type: ignore[return-value]

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight, with its type."""
        return self.weight  # type: ignore[return-value]

    @property
    def transposed(self) -> bool:
        """Whether it is (experts, in, out)."""
        return is_transposed(self.experts, shards.local_part(self.weight).format)

    @property
    def in_features(self) -> int:
        """Of each expert."""
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        """Of each expert."""
        return self.weight.shape[2 if self.transposed else 1]

    @property
    def adapters(self) -> dict[str, LoRAAdapter]:
        """The adapters that have a part in this weight, by name."""
        if not isinstance(self.experts, QLoRAExperts):
            return {}
        held = {name: self.experts.adapters_of(name) for name in self.experts.adapters}
        return {name: of[self.parameter] for name, of in held.items() if self.parameter in of}

    @property
    def active_adapter(self) -> str | None:
        """Of the module."""
        return self.experts.active_adapter if isinstance(self.experts, QLoRAExperts) else None

    @property
    def adapter(self) -> LoRAAdapter | None:
        """The active one; None if the base alone is computed."""
        return self.adapter_of(self.active_adapter)

    def adapter_of(self, name: str | None) -> LoRAAdapter | None:
        """The adapter of that name; None if there is none."""
        return None if name is None else self.adapters.get(name)

    def active(self) -> LoRAAdapter:
        """The active adapter.

        Raises:
            AttributeError: if the base alone is computed.
        """
        adapter = self.adapter
        if adapter is None:
            msg = f"{self.parameter} of {self.experts.path} has no active adapter"
            raise AttributeError(msg)
        return adapter

    @property
    def merged(self) -> bool:
        """Whether an adapter is in the weight."""
        return self.parameter in getattr(self.experts, "merged_names", ())

    @merged.setter
    def merged(self, merged: bool) -> None:
        experts: Any = self.experts
        others = [name for name in experts.merged_names if name != self.parameter]
        experts.merged_names = (*others, self.parameter) if merged else tuple(others)

    def delta(self, expert: int | None = None) -> Tensor:
        """What the active adapter adds to the weight, or to one expert's, fp32 in its shape."""
        product = self.active().product(expert)
        return product.mT if self.transposed else product

    def make_adapter(
        self,
        *,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        lora_mode: str = "separate",
        merge_into: object = None,
        **lora: Any,
    ) -> LoRAAdapter:
        """An adapter that fits the weight; of the arguments of ``QLoRALinear`` those of PEFT.

        Raises:
            FormatError: for settings that adapters of experts have not, and for a module whose
                forward was replaced.
            ShapeError: for a rank below 1, or a weight that is sharded.
        """
        asked = {
            "lora_dropout": lora_dropout != 0.0,
            "use_dora": bool(use_dora),
            "init_lora_weights": init_lora_weights not in PLAIN_INITS,
            "lora_mode": lora_mode != "separate",
            "merge_into": merge_into is not None,
        }
        if any(asked.values()):
            names = [name for name, is_asked in asked.items() if is_asked]
            advice = "leave it out"
            if not asked["lora_dropout"] and not asked["use_dora"]:  # in files they are one setting
                advice = (
                    "linear layers can have it by an add_lora of their own, before one with "
                    "target_modules=[] and target_parameters"
                )
            msg = f"adapters of stacked experts have no {', '.join(names)}: {advice}"
            raise FormatError(msg)
        own = QuantizedExperts.forward.__get__(self.experts)
        if vars(self.experts).get("forward", own) != own:
            msg = "the module's forward was replaced on the instance (by accelerate?): undo that"
            raise FormatError(msg)
        if shards.is_sharded(self.weight) or not self.quantized_weight.is_whole:
            msg = "the weight is one rank's shard: add adapters before the model is sharded"
            raise ShapeError(msg)
        for name in ("dense", "loftq_iterations", "method"):  # of other initializations
            lora.pop(name, None)
        return LoRAAdapter(
            self.out_features,
            self.in_features,
            experts=self.weight.shape[0],
            device=self.weight.device,
            init_lora_weights=init_lora_weights,
            **lora,
        )

    def target_of(self, adapter: LoRAAdapter, merge_into: object) -> None:
        """What ``merge_into`` names: nothing.

        Raises:
            FormatError: for anything but None.
        """
        if merge_into is not None:
            msg = "adapters of stacked experts cannot be trained for a merge"
            raise FormatError(msg)

    def add_adapter(self, name: str, adapter: LoRAAdapter) -> None:
        """Hold one more adapter; which is active stays. The module becomes ``QLoRAExperts``.

        Raises:
            FormatError: for a name that no module can have.
            AdapterMismatchError: if there is one of that name.
        """
        check_name(name)
        if name in self.adapters:
            msg = f"{self.experts.path}.{self.parameter} has an adapter {name!r} already"
            raise AdapterMismatchError(msg)
        module: Any = self.experts
        if not isinstance(module, QLoRAExperts):
            derive(module, QLoRAExperts)
            module.adapters = nn.ModuleDict()
            module.active_adapter = None
        if name not in module.adapters:
            module.adapters[name] = nn.ModuleDict()
        module.adapters[name][self.parameter] = adapter
        module.adapters.train(module.training)


def expert_weights(path: str, module: nn.Module) -> dict[str, ExpertWeight]:
    """The quantized weights of a module of experts, by the path of each, in PEFT's order."""
    if not isinstance(module, QuantizedExperts) or not path:
        return {}
    held = module.quantized_names()
    names = [name for name in weight_names(module) if name in held]
    return {f"{path}.{name}": ExpertWeight(module, name) for name in names}
