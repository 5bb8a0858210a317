"""Embeddings whose weight is quantized by rows: what ``qkern quantize --embeddings`` writes."""

from __future__ import annotations

import torch
from torch import nn

from qkern.derived_class import DerivedClass, derive, restore
from qkern.errors import FormatError
from qkern.flat_weight import FlatWeight
from qkern.tensor import QuantizedTensor


class QuantizedEmbedding(DerivedClass, FlatWeight):
    """What ``hold_quantized`` adds to a class of embeddings: its ``state_dict``.

    Its forward is that of the class: ``F.embedding`` decodes the rows of a quantized weight that
    are asked for.
    """


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
        derive(module, QuantizedEmbedding)


def hold_dense(module: QuantizedEmbedding, weight: nn.Parameter) -> None:
    """Make a quantized embedding what it was, with a dense weight; in place."""
    module.weight = weight
    restore(module)
