"""What becomes of each tensor of a checkpoint that is written anew from file to file. No torch.

Quantizing, converting and merging differ in their outcomes alone: ``OutputPlan`` gives these their
places, ``running`` writes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from qkern import entry_keys
from qkern.checkpoint.entries import Piece, weight_pieces
from qkern.checkpoint.layout import Weight
from qkern.checkpoint.source import Entry, Source, StoredTensor
from qkern.checkpoint.stream import Blocks, Delta, Dense, Quantized, Span
from qkern.formats import QuantFormat

# safetensors' names and sizes of the dtypes that are read and written as numbers.
DTYPE_NAMES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_SIZES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

# What may become of a tensor.
COPIED, CAST, CARRIED = "copied", "cast", "codes copied"
QUANTIZED, DEQUANTIZED, MERGED, REPLACED = "quantized", "dequantized", "merged", "replaced"
LEFT_OUT: Final = "left out"


class Factors(Protocol):
    """An adapter's part of a weight, read when its turn comes."""

    @property
    def nbytes(self) -> int:
        """Of both factors, in memory."""

    def read(self) -> Delta:
        """The factors."""


class Step(NamedTuple):
    """What one job writes; an entry whose content is known needs none.

    Args:
        item: an entry, or all entries of a weight that is quantized.
        source: where its bytes lie (copied), or its values or codes.
        method: how a quantized item's codes are chosen.
        factors: what is added before.
        change: what copied bytes become, see ``CopyJob``.
        shape: of the values as they are read, if not that of the item.
        transposed: whether matrices are written transposed.
    """

    item: Piece | Weight
    source: Span | Dense | Quantized | Blocks | None
    method: str = "absmax"
    factors: Factors | None = None
    change: str | None = None
    shape: tuple[int, ...] | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Of the job, for errors and the journal."""
        return self.item.key if isinstance(self.item, Piece) else self.item.name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What becomes of a tensor.

    Args:
        tensor: before.
        name: its key after.
        file: the input whose output holds it.
        shape: of the dense tensor, after.
        dtype: of the dense tensor, after.
        format: after, with ``for_shape``; None if it is dense.
        action: what is done, one of the names above.
        steps: how.
        reason: why it is not as asked, or why it was left; may be empty.
    """

    tensor: StoredTensor
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    format: QuantFormat | None
    action: str
    steps: tuple[Step, ...]
    reason: str = ""


class Places:
    """Where the entries of a source lie, as jobs say it.

    Args:
        source: whose files are the inputs, in their order.
        first: the number of its first file among the inputs.
    """

    def __init__(self, source: Source, first: int = 0) -> None:
        self.source = source
        self._numbers = {file: first + i for i, file in enumerate(source.files)}

    def span(self, key: str) -> Span:
        """The first byte of an entry."""
        entry = self.source.entries[key]
        return Span(self._numbers[entry.file], entry.begin)

    def dense(self, name: str) -> Dense:
        """The values of a dense tensor."""
        return Dense(self.source.tensors[name].dtype, self.span(name))

    def quantized(self, name: str) -> Quantized:
        """The codes of a quantized tensor."""
        state = self.source.state(name)
        fmt = state.format
        return Quantized(
            format=fmt,
            codes=self.span(name),
            scales=self.span(entry_keys.scales_key(name, fmt)),
            nested=self.span(f"{name}.nested_absmax") if fmt.double_quant else None,
            offset=state.offset,
        )

    def values(self, tensor: StoredTensor) -> Dense | Quantized:
        """The values of a tensor, however it is stored."""
        return self.dense(tensor.name) if tensor.format is None else self.quantized(tensor.name)


def in_file_order(source: Source) -> Iterator[StoredTensor]:
    """Tensors in the order in which they lie in the files, by their first entry."""
    order = {key: i for i, key in enumerate(source.entries)}

    def place(tensor: StoredTensor) -> int:
        return min(order[key] for key in source.keys_of(tensor.name))

    return iter(sorted(source.tensors.values(), key=place))


def copied(tensor: StoredTensor, places: Places, reason: str = "") -> Outcome:
    """A dense tensor whose bytes go over as they are."""
    entry = places.source.entries[tensor.name]
    step = Step(piece_of(entry), places.span(tensor.name))
    return _outcome(tensor, tensor.dtype, None, COPIED, (step,), reason)


def written_dense(
    tensor: StoredTensor,
    dtype: str,
    places: Places,
    *,
    factors: Factors | None = None,
    transposed: bool = False,
    reason: str = "",
) -> Outcome:
    """A tensor, dense or quantized, as dense values of ``dtype``."""
    if tensor.format is None and tensor.dtype == dtype and factors is None:
        return copied(tensor, places, reason)
    shape = tensor.shape
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    piece = dense_piece(tensor.name, dtype, shape)
    source = places.values(tensor)
    step = Step(piece, source, factors=factors, shape=tensor.shape, transposed=transposed)
    action = CAST if tensor.format is None else DEQUANTIZED
    action = action if factors is None else MERGED
    outcome = _outcome(tensor, dtype, None, action, (step,), reason)
    return dataclasses.replace(outcome, shape=shape)


def written_quantized(
    tensor: StoredTensor,
    fmt: QuantFormat,
    places: Places,
    *,
    method: str = "absmax",
    factors: Factors | None = None,
    transposed: bool = False,
    reason: str = "",
) -> Outcome:
    """A tensor, dense or quantized, as codes of ``fmt`` (after ``for_shape``)."""
    shape = tensor.shape[::-1] if transposed else tensor.shape
    weight = Weight(tensor.name, shape, tensor.dtype, fmt)
    chosen = method if fmt.code is not None else "absmax"
    values, stored = places.values(tensor), tensor.shape
    step = Step(weight, values, chosen, factors, shape=stored, transposed=transposed)
    action = QUANTIZED if factors is None else MERGED
    outcome = _outcome(tensor, tensor.dtype, fmt, action, (step,), reason)
    return dataclasses.replace(outcome, shape=shape)


def carried(tensor: StoredTensor, places: Places, reason: str = "") -> Outcome:
    """A quantized tensor with the codes and scales that it has; its tables are written anew."""
    name, source = tensor.name, places.quantized(tensor.name)
    offset = places.source.state(name).offset
    pieces = weight_pieces(name, tensor.shape, tensor.dtype, source.format, offset)
    steps = [Step(pieces.codes, source.codes), Step(pieces.scales, source.scales)]
    if pieces.nested is not None:
        steps.append(Step(pieces.nested, source.nested))
    tables = list(pieces.tables)
    for other in (key for key, owner in places.source.tied.items() if owner == name):
        shared = weight_pieces(other, tensor.shape, tensor.dtype, source.format, offset)
        tables += shared.tables  # codes and scales are those of ``name``
    steps += [Step(table, None) for table in tables]
    return _outcome(tensor, tensor.dtype, source.format, CARRIED, steps, reason)


def piece_of(entry: Entry) -> Piece:
    """An entry as it is."""
    return Piece(entry.key, entry.dtype, entry.shape, entry.nbytes)


def dense_piece(name: str, dtype: str, shape: tuple[int, ...]) -> Piece:
    """The entry of a dense tensor."""
    return Piece(name, DTYPE_NAMES[dtype], shape, ITEM_SIZES[dtype] * math.prod(shape))


def _outcome(
    tensor: StoredTensor,
    dtype: str,
    fmt: QuantFormat | None,
    action: str,
    steps: Sequence[Step],
    reason: str,
) -> Outcome:
    name, file, shape = tensor.name, tensor.file, tensor.shape
    return Outcome(tensor, name, file, shape, dtype, fmt, action, tuple(steps), reason)
