"""What holds adapters by name: one of them is active, or each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern import operands
from qkern.activation_checkpointing import innermost_checkpoint
from qkern.errors import AdapterMismatchError, ShapeError
from qkern.lora_adapter import LoRAAdapter, check_name


class NamedAdapters(nn.Module):
    """What switching adapters needs of a module: a layer, or one of ``modules_to_save``.

    Attributes:
        path: where a model holds the module, for errors.
        adapters: modules by the name of their adapter.
        active_adapter: name of the active one; None, or a name that is not among them, for the
            base alone.
        rows: the adapter of each row of a batch, set by ``qkern.adapter_rows``.
        merged: whether the active one is in the weight.
    """

    adapters: nn.ModuleDict
    active_adapter: str | None
    path: str = ""
    merged: bool = False
    rows: tuple[str | None, ...] | None = None
    _seen_rows: tuple[str | None, ...] | None = None

    def has_rows(self) -> bool:
        """Whether rows have adapters of their own in this call.

        Raises:
            AdapterMismatchError: if this is a call again, by checkpointing, outside of the
                ``adapter_rows`` of the first one: other adapters would take part in the backward.
        """
        if self.rows != self._seen_rows:
            if not _may_be_computed_again():
                return self.rows is not None
            if torch._C._current_graph_task_id() != -1:
                msg = (
                    f"{self._name()} is computed again for a backward with other rows than in its "
                    "forward: call backward() inside of the same adapter_rows"
                )
                raise AdapterMismatchError(msg)
            self._seen_rows = self.rows
        return self.rows is not None

    def by_rows(self, x: Tensor, apply: Callable[[Tensor, str | None], Any]) -> Any:
        """What the module makes of a batch whose rows have different adapters.

        Args:
            x: (batch, ...). A batch k times as long as ``rows`` has k rows for each, one after
                another, as beams and flattened tokens have.
            apply: makes of some rows and the name of their adapter (rows, ...).

        Raises:
            ShapeError: for a batch that is no multiple of ``rows``.
        """
        rows: Sequence[str | None] = self.rows or (None,)
        if x.dim() == 0 or x.shape[0] % len(rows):
            msg = f"{self._name()} got x of {tuple(x.shape)}, adapter_rows has {len(rows)} rows"
            raise ShapeError(msg)
        names = dict.fromkeys(rows)
        if len(names) == 1:
            return apply(x, rows[0])
        of_row = torch.arange(x.shape[0]).reshape(len(rows), -1)
        groups = [of_row[[row == name for row in rows]].reshape(-1) for name in names]
        chosen = zip(names, groups, strict=True)
        parts = [apply(x[group.to(x.device)], name) for name, group in chosen]
        return torch.cat(parts)[torch.cat(groups).argsort().to(x.device)]

    def _name(self) -> str:
        return self.path or type(self).__name__


class AdapterHolder(NamedAdapters):
    """``NamedAdapters`` of low rank; what an adapter has is here that of the active one."""

    def add_adapter(self, name: str, adapter: LoRAAdapter) -> None:
        """Hold one more adapter; which is active stays.

        Raises:
            FormatError: for a name that no module can have.
            AdapterMismatchError: if there is one of that name.
        """
        check_name(name)
        if name in self.adapters:
            msg = f"{self._name()} has an adapter {name!r} already"
            raise AdapterMismatchError(msg)
        self.adapters[name] = adapter

    @property
    def adapter(self) -> LoRAAdapter | None:
        """The active adapter; None if the base alone is computed."""
        return self.adapter_of(self.active_adapter)

    def adapter_of(self, name: str | None) -> LoRAAdapter | None:
        """The adapter of that name; None if there is none."""
        return self.adapters._modules.get(name)  # type: ignore[arg-type, return-value]

    def active(self) -> LoRAAdapter:
        """The active adapter.

        Raises:
            AttributeError: if the base alone is computed.
        """
        adapter = self.adapter
        if adapter is None:  # an AttributeError, so that hasattr tells
            held = sorted(self.adapters) or "none"
            msg = (
                f"{self._name()} has no active adapter: qkern.set_adapter chooses one; it holds "
                f"{held}"
            )
            raise AttributeError(msg)
        return adapter

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802 - the field's name
        """(r, in_features), of the active adapter."""
        return self.active().lora_A

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802 - the field's name
        """(out_features, r), of the active adapter."""
        return self.active().lora_B

    @property
    def r(self) -> int:
        """Rank of the active adapter."""
        return self.active().r

    @property
    def lora_alpha(self) -> float:
        """Of the active adapter."""
        return self.active().lora_alpha

    @property
    def use_rslora(self) -> bool:
        """Of the active adapter."""
        return self.active().use_rslora

    @property
    def scaling(self) -> float:
        """Factor of the active adapter's part."""
        return self.active().scaling

    @property
    def lora_dropout(self) -> float:
        """Of the active adapter; may be set at any time."""
        return self.active().lora_dropout

    @lora_dropout.setter
    def lora_dropout(self, lora_dropout: float) -> None:
        operands.check_dropout(lora_dropout)
        self.active().lora_dropout = lora_dropout

    def set_scaling(self, lora_alpha: float, *, use_rslora: bool) -> None:
        """Set the factor of the active adapter's part."""
        self.active().set_scaling(lora_alpha, use_rslora=use_rslora)


def _may_be_computed_again() -> bool:
    """Whether a backward may repeat this call: not if it is under ``no_grad`` on its own account.

    Reentrant checkpointing turns gradients off for its forward.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    return innermost_checkpoint() is not None
