"""Whether a quantized model can be sharded: what each rank will hold, and what is in the way."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from qkern import shards
from qkern.errors import AdapterMismatchError, DTypeError, FormatError
from qkern.flat_weight import FlatParameters
from qkern.text_table import format_bytes, format_table


@dataclasses.dataclass(frozen=True)
class ShardingRow:
    """One quantized weight.

    Args:
        name: path of its module; of the parameter where that is not "weight".
        shape: of the dense weight.
        nbytes: as stored, whole.
        common: bytes that every rank holds: second-level scales, or all.
        reason: why it is held whole by every rank; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    common: int
    reason: str

    @property
    def sharded(self) -> bool:
        """Whether its rows are spread over the ranks."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class ShardingReport:
    """What ``fsdp_ready`` found; ``print(report)`` is a table.

    Args:
        rows: the quantized weights; one that modules share is there once.
        frozen: all parameters that are not trained: ``ignored_states`` of FSDP1.
    """

    rows: tuple[ShardingRow, ...]
    frozen: tuple[nn.Parameter, ...] = dataclasses.field(repr=False)

    def bytes_per_rank(self, ranks: int) -> int:
        """Bytes of quantized weights on one of ``ranks``, but for those that are gathered just now.

        Where rows do not divide evenly the first ranks have one more of a weight.
        """
        return sum(row.common + -(-(row.nbytes - row.common) // ranks) for row in self.rows)

    def __str__(self) -> str:
        """The table."""
        cells = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                format_bytes(row.nbytes),
                "rows are spread" if row.sharded else "whole on every rank",
                row.reason,
            )
            for row in self.rows
        ]
        headers = ("weight", "shape", "stored", "under FSDP2", "why")
        return format_table(cells, headers) if cells else "no quantized weight"


def fsdp_ready(model: nn.Module) -> ShardingReport:
    """Check a model before ``fully_shard``: what is spread over the ranks, and what cannot be.

    FSDP2 shards packed bytes and scales by rows. FSDP1 flattens parameters into one, which packed
    bytes cannot be part of: give it ``report.frozen`` as ``ignored_states``, and it shards the
    adapters alone. DDP needs nothing.

    Args:
        model: after ``quantize_model``, and ``add_lora`` or PEFT.

    Raises:
        DTypeError: if what is trained has several dtypes, which FSDP does not put into one group.
        AdapterMismatchError: if an adapter is merged: the bytes that unmerging restores are not
            sharded.
        FormatError: if projections are fused: a layer would multiply shards of its siblings.

    Example:
        >>> import qkern, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> coverage = qkern.quantize_model(model)
        >>> report = qkern.fsdp_ready(model)
        >>> [(row.name, row.sharded) for row in report.rows]
        [('0', True), ('1', False)]
    """
    rows: dict[int, ShardingRow] = {}
    for name, module in model.named_modules():
        if getattr(module, "merged", False):
            msg = f"{name} has a merged adapter: call unmerge_adapter before the model is sharded"
            raise AdapterMismatchError(msg)
        if getattr(module, "siblings", None) is not None:
            msg = f"{name} is computed with other layers: call qkern.unfuse_projections first"
            raise FormatError(msg)
        if isinstance(module, FlatParameters):
            for key in module.quantized_names():
                weight = module._parameters[key]
                path = name if key == "weight" else f"{name}.{key}"
                rows.setdefault(id(weight), _row(path, weight))
    trained: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.setdefault(parameter.dtype, name)
    if len(trained) > 1:
        found = ", ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        msg = f"what is trained must be of one dtype for FSDP, found {found}: cast one of them"
        raise DTypeError(msg)
    frozen = tuple(p for p in model.parameters() if not p.requires_grad)
    return ShardingReport(tuple(rows.values()), frozen)


def _row(name: str, parameter: nn.Parameter | None) -> ShardingRow:
    weight = shards.local_part(parameter)
    shape, nbytes = tuple(weight.whole_shape), weight.nbytes
    if not weight.has_rows:
        reason = f"blocks of {weight.format.blocksize} cross its rows"
        return ShardingRow(name, shape, nbytes, nbytes, reason)
    common = sum(part.nbytes for part in (weight.nested_absmax, weight.offset) if part is not None)
    return ShardingRow(name, shape, nbytes, common, "")
