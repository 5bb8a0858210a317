"""What would be lost in silence where adapters are written and loaded: checks that say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qkern.errors import AdapterMismatchError, DeviceError, NonFiniteError
from qkern.layers import QuantizedLinear


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write NaN or infinity: whoever loads it would get nothing else.

    Raises:
        NonFiniteError: naming the entry and how many of its values are.
    """
    for key, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            msg = (
                f"{key} holds {bad} values that are NaN or infinite of {tensor.numel()}: the "
                "adapter is not saved; go back to an earlier one, and lower the learning rate"
            )
            raise NonFiniteError(msg)


def check_place(layers: Mapping[str, QuantizedLinear]) -> None:
    """Refuse layers on meta: the adapter's values would be lost there.

    Raises:
        DeviceError: naming the first.
    """
    for name, layer in layers.items():
        if layer.weight.is_meta:
            msg = f"{name} is on meta, where an adapter has no values: load the base model first"
            raise DeviceError(msg)


def check_tokens(model: nn.Module, trained_on: str | None, directory: Path) -> None:
    """Refuse an adapter of a model whose embeddings had another number of tokens.

    Args:
        model: to load into.
        trained_on: the number in the file; None if it does not say.
        directory: of the file.

    Raises:
        AdapterMismatchError: naming both numbers.
    """
    here = token_count(model)
    if here is None or trained_on in (None, str(here)):
        return
    msg = (
        f"{directory}: the adapter was trained with embeddings of {trained_on} tokens, the model "
        f"has {here}: resize them (model.resize_token_embeddings({trained_on})) and load what was "
        "trained of them, or pass force=True"
    )
    raise AdapterMismatchError(msg)


def token_count(model: nn.Module) -> int | None:
    """How many tokens the input embeddings of one of transformers' models have, else None."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = get() if callable(get) else None
    except NotImplementedError:  # a model of images, say
        return None
    weight = getattr(embeddings, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
