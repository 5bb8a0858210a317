"""Which of a model's adapters are computed: one, none, or one for each row of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from qkern.adapted import check_unmerged, holders
from qkern.adapter_config import nearest
from qkern.errors import AdapterMismatchError, ShapeError


def set_adapter(model: nn.Module, name: str, *, trainable: bool | Collection[str] = True) -> None:
    """Compute with one adapter from now on; layers that it has no part in compute their base.

    The other adapters are frozen, so that an optimizer made of what is trainable trains this one.

    Args:
        model: with adapters.
        name: of one of them.
        trainable: whether it trains; or the name or names of all adapters that do, as those of
            ``adapter_rows``.

    Raises:
        AdapterMismatchError: if there is no adapter of a name, or one is merged.
    """
    if isinstance(trainable, bool):
        trained = {name} if trainable else set()
    else:
        trained = {trainable} if isinstance(trainable, str) else set(trainable)
    _check_names(model, {name, *trained})
    check_unmerged(model)
    for holder in holders(model):
        holder.active_adapter = name
        for key, adapter in holder.adapters.items():
            adapter.requires_grad_(key in trained)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which its layers have them."""
    return list(dict.fromkeys(name for holder in holders(model) for name in holder.adapters))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter. If it was the active one, the base alone is computed until another is set.

    What an initialization moved from the base into the adapter (PiSSA, OLoRA) goes with it.

    Raises:
        AdapterMismatchError: if there is no adapter of that name, one is merged, or this one is in
            use (``adapter_rows``).
    """
    _check_names(model, {name})
    check_unmerged(model)
    if any(name in (holder.rows or ()) for holder in holders(model)):
        msg = f"rows of a batch have the adapter {name!r}: leave qkern.adapter_rows first"
        raise AdapterMismatchError(msg)
    for holder in holders(model):
        if name in holder.adapters:
            del holder.adapters[name]
        if holder.active_adapter == name:
            holder.active_adapter = None


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute the base model alone within, as a reference model for preferences is.

    Of an adapter that started by PiSSA, OLoRA or several iterations of LoftQ, the base lacks the
    part that was moved into the adapter: it is no reference.

    Raises:
        AdapterMismatchError: if an adapter is merged.

    Example:
        >>> import qkern, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = qkern.quantize_model(model)
        >>> layers = qkern.add_lora(model, init_lora_weights=False)
        >>> x = torch.ones(1, 64)
        >>> with qkern.disable_adapter(model):
        ...     base = model(x)
        >>> torch.equal(model(x), base)
        False
    """
    check_unmerged(model)
    before = [(holder, holder.active_adapter, holder.rows) for holder in holders(model)]
    for holder, _, _ in before:
        holder.active_adapter = holder.rows = None
    try:
        yield
    finally:
        for holder, active, rows in before:
            holder.rows = rows
            if holder.active_adapter is None:  # else set_adapter has chosen another one since
                holder.active_adapter = active


@contextlib.contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Compute each row of a batch with an adapter of its own within.

    Every input of the model's layers must begin with the batch. One k times as long as ``names``
    has k rows for each name, one after another: beams, several sequences of a prompt, and tokens
    flattened into the batch's dimension are so. (Tokens sorted by expert are not.)

    Each group of rows is multiplied by itself, forward and backward, and gets what its adapter
    alone gives. Of layers that are checkpointed, ``backward()`` belongs inside too. To train
    several adapters at once: ``set_adapter(model, "a", trainable=["a", "b"])``.

    Args:
        model: with adapters.
        names: the adapter of each row; None for the base alone.

    Raises:
        AdapterMismatchError: if there is no adapter of a name, or one is merged.
        ShapeError: for no row; and, where the model is called, for a batch that does not fit.

    Example:
        >>> import qkern, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = qkern.quantize_model(model)
        >>> for name in ("french", "german"):
        ...     layers = qkern.add_lora(model, adapter_name=name)
        >>> with qkern.adapter_rows(model, ["french", None, "german"]):
        ...     model(torch.ones(3, 64)).shape
        torch.Size([3, 64])
    """
    if isinstance(names, str) or not names:
        msg = f"adapter_rows needs a name or None for each row, got {names!r}"
        raise ShapeError(msg)
    _check_names(model, {name for name in names if name is not None})
    check_unmerged(model)
    before = [(holder, holder.rows) for holder in holders(model)]
    for holder, _ in before:
        holder.rows = tuple(names)
    try:
        yield
    finally:
        for holder, rows in before:
            holder.rows = rows


def _check_names(model: nn.Module, names: Collection[str]) -> None:
    known = adapter_names(model)
    for name in sorted(names):
        if name not in known:
            near = nearest(name, known)
            msg = f"the model has no adapter {name!r}; nearest: {near}; its adapters: {known}"
            raise AdapterMismatchError(msg)
