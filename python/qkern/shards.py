"""A weight that FSDP2 sharded: a ``DTensor`` around one rank's ``QuantizedTensor``.

Its ``state_dict`` entries have the flat keys of the whole weight. Codes and scales are
``DTensor``s, sharded by rows; all else is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import flat_keys
from qkern.errors import FormatError
from qkern.tensor import QuantizedTensor


def is_sharded(weight: Tensor) -> bool:
    """Whether ``weight`` is a ``DTensor``, without importing torch.distributed to find out."""
    return hasattr(weight, "_local_tensor") and hasattr(weight, "device_mesh")


def local_part(weight: Any) -> QuantizedTensor:
    """This rank's part of a weight; the weight itself if it is whole."""
    local: QuantizedTensor = weight._local_tensor if is_sharded(weight) else weight
    return local


def entries(weight: Any, key: str) -> dict[str, Tensor]:
    """The ``state_dict`` entries of a weight, sharded or whole."""
    local = local_part(weight)
    if not is_sharded(weight) or not local.has_rows:  # every rank holds everything
        return flat_keys.flatten(local, key)
    from torch.distributed.tensor import DTensor

    def wrap(rows: Tensor) -> Tensor:
        return DTensor.from_local(
            rows,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=torch.Size((weight.shape[0], *rows.shape[1:])),
            stride=rows.stride(),
        )

    one_each = local.format.kind.per_row
    absmax = local.absmax.reshape(-1) if one_each else local.absmax.contiguous()
    entries = {key: wrap(local.packed), flat_keys.scales_key(key, local.format): wrap(absmax)}
    return entries | flat_keys.companions(local, key)


def load(weight: Any, state_dict: Mapping[str, Any], key: str) -> None:
    """Copy one rank's rows, from sharded or whole entries, into a sharded weight.

    Raises:
        FormatError: if the entries are of another shape or format.
    """
    local: QuantizedTensor = weight._local_tensor
    state = flat_keys.read_state(state_dict, key)
    if state.format != local.format or torch.Size(state.shape) != local.whole_shape:
        msg = (
            f"{key}: the file holds {list(state.shape)} {state.format}, "
            f"the module {list(local.whole_shape)} {local.format}"
        )
        raise FormatError(msg)
    rank, first = weight.device_mesh.get_local_rank(), 0
    if local.has_rows:
        first = rank * -(-local.whole_shape[0] // weight.device_mesh.size())

    def rows(name: str, mine: Tensor) -> Any:
        entry = state_dict[name]
        if is_sharded(entry):
            return entry._local_tensor.reshape(mine.shape)
        if not local.has_rows:
            return entry.reshape(mine.shape)
        whole = entry.reshape(local.whole_shape[0], -1)
        return whole[first : first + mine.shape[0]]

    with torch.no_grad():
        local.packed.copy_(rows(key, local.packed))
        local.absmax.copy_(rows(flat_keys.scales_key(key, local.format), local.absmax))
        if local.nested_absmax is not None and local.offset is not None:
            local.nested_absmax.copy_(state_dict[f"{key}.nested_absmax"])
            local.offset.fill_(state.offset)
