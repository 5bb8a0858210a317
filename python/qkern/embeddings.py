"""Embeddings whose weight is quantized by rows: what ``qkern quantize --embeddings`` writes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from qkern.errors import FormatError
from qkern.flat_weight import FlatWeight
from qkern.tensor import QuantizedTensor


class QuantizedEmbedding(FlatWeight):
    """What ``hold_quantized`` adds to a class of embeddings: its ``state_dict``.

    Its forward is that of the class: ``F.embedding`` decodes the rows of a quantized weight that
    are asked for. The class is derived from both, so that the module stays what it was for
    everybody who asks.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, which finds no class that was made at run time."""
        return _rebuild, (type(self).__bases__[1],), vars(self)


def hold_quantized(module: nn.Embedding, weight: QuantizedTensor) -> None:
    """Give an embedding a quantized weight, in place.

    Args:
        module: of any class.
        weight: (rows, columns), int8_row.

    Raises:
        FormatError: for another format, or an embedding that scales its rows in place.
    """
    if not weight.format.kind.per_row:
        msg = f"an embedding in {weight.format.quant_type} cannot be read: int8_row can be"
        raise FormatError(msg)
    if module.max_norm is not None:
        msg = "an embedding with max_norm scales its rows in place: it cannot be quantized"
        raise FormatError(msg)
    if module.weight is not weight:  # one that is tied holds it already
        with torch.inference_mode(False):
            module.weight = nn.Parameter(weight, requires_grad=False)
    if not isinstance(module, QuantizedEmbedding):
        kind: Any = type(module)
        module.__class__ = _class_of(kind)


def hold_dense(module: QuantizedEmbedding, weight: nn.Parameter) -> None:
    """Make a quantized embedding what it was, with a dense weight; in place."""
    module.weight = weight
    kind: Any = type(module).__bases__[1]
    module.__class__ = kind


@functools.cache
def _class_of(embedding: Any) -> Any:
    return type(f"Quantized{embedding.__name__}", (QuantizedEmbedding, embedding), {})


def _rebuild(embedding: Any) -> Any:
    made = _class_of(embedding)
    return made.__new__(made)
