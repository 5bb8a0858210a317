"""Weights that other programs store as E2M1 codes with scales of 8 bits: MXFP4 and NVFP4. No torch.

Two codes are in a byte, the first in its low half; blocks run along the rows of a matrix, whose
length is a multiple of theirs.

    MXFP4, transformers (gpt-oss)         x_blocks U8 (experts, out, in / 32, 16)
                                          x_scales U8 (experts, out, in / 32), powers of two
    MXFP4, compressed-tensors             x.weight_packed U8 (out, in / 2)
                                          x.weight_scale U8 (out, in / 32)
    NVFP4, compressed-tensors             x.weight_packed U8, x.weight_scale F8_E4M3 (out, in / 16)
                                          x.weight_global_scale F32, which divides
    NVFP4, ModelOpt                       x.weight U8, x.weight_scale F8_E4M3
                                          x.weight_scale_2 F32, which multiplies
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import numpy as np

from qkern.checkpoint.entries import weight_pieces
from qkern.checkpoint.outcomes import (
    CARRIED,
    DEQUANTIZED,
    LEFT_OUT,
    Outcome,
    Places,
    Step,
    dense_piece,
)
from qkern.checkpoint.source import Entry, Source, StoredTensor
from qkern.checkpoint.stream import Blocks
from qkern.errors import CorruptFileError, FormatError
from qkern.formats import QuantFormat

MXFP4: Final = QuantFormat("mxfp4", 32)
# Who writes such files, as config.json says.
METHODS: Final = ("mxfp4", "modelopt", "compressed-tensors")
# Scales of activations and caches beside the weights, of no use to dense ones.
_ACTIVATIONS: Final = (
    *("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale"),
)


@dataclasses.dataclass(frozen=True)
class BlockWeight:
    """A weight of this kind.

    Args:
        name: of the dense tensor.
        codes: key of the codes.
        scales: key of their scales.
        shape: of the values as they are stored, (..., out, in).
        kind: "mxfp4" or "nvfp4".
        factor: of all scales.
        divisor: of all scales.
        transposed: whether the dense tensor is (..., in, out), as transformers' gpt-oss has it.
        nbytes: of codes and scales.
    """

    name: str
    codes: str
    scales: str
    shape: tuple[int, ...]
    kind: str
    factor: float
    divisor: float
    transposed: bool
    nbytes: int


class BlockWeights:
    """The weights of this kind in a checkpoint.

    Args:
        source: the checkpoint.

    Attributes:
        by_codes: weights by the key of their codes.
        parts: keys of their scales.
        unused: keys of scales that are of no use to weights.

    Raises:
        CorruptFileError: if entries of a weight are missing or contradict each other.
    """

    def __init__(self, source: Source) -> None:
        self.by_codes: dict[str, BlockWeight] = {}
        self.parts: set[str] = set()
        self._source = source
        entries = source.entries
        for key, entry in entries.items():
            if entry.dtype != "U8" or key in self.parts:
                continue
            stem = key.removesuffix("_blocks")
            if stem != key and f"{stem}_scales" in entries:
                self._add_stacked(stem, entry)
            elif key.endswith(".weight_packed"):
                self._add_packed(key.removesuffix("_packed"), entry)
            elif key.endswith(".weight") and f"{key}_scale_2" in entries:
                self._add_modelopt(key, entry)
        self.unused = {
            key for key in entries if self.by_codes and key.rpartition(".")[2] in _ACTIVATIONS
        }

    def __bool__(self) -> bool:
        return bool(self.by_codes)

    def _add_stacked(self, stem: str, codes: Entry) -> None:
        scales = self._source.entries[f"{stem}_scales"]
        shape = (*codes.shape[:-2], 32 * scales.shape[-1]) if scales.shape else ()
        _check(codes, (*scales.shape, 16), scales, "U8", scales.shape)
        self._add(stem, codes, scales, shape, transposed=len(shape) == 3)

    def _add_packed(self, name: str, codes: Entry) -> None:
        scales = self._needed(f"{name}_scale", codes)
        if scales.dtype == "U8":
            self._add(name, codes, scales, _matrix(codes, scales, 32, "U8"))
        else:
            shape = _matrix(codes, scales, 16, "F8_E4M3")
            divisor = self._number(f"{name}_global_scale", codes)
            self._add(name, codes, scales, shape, "nvfp4", divisor=divisor)

    def _add_modelopt(self, name: str, codes: Entry) -> None:
        scales = self._needed(f"{name}_scale", codes)
        shape = _matrix(codes, scales, 16, "F8_E4M3")
        factor = self._number(f"{name}_scale_2", codes)
        self._add(name, codes, scales, shape, "nvfp4", factor=factor)

    def _add(
        self,
        name: str,
        codes: Entry,
        scales: Entry,
        shape: tuple[int, ...],
        kind: str = "mxfp4",
        *,
        factor: float = 1.0,
        divisor: float = 1.0,
        transposed: bool = False,
    ) -> None:
        self.parts.add(scales.key)
        nbytes = codes.nbytes + scales.nbytes
        self.by_codes[codes.key] = BlockWeight(
            name, codes.key, scales.key, shape, kind, factor, divisor, transposed, nbytes
        )

    def _needed(self, key: str, codes: Entry) -> Entry:
        found = self._source.entries.get(key)
        if found is None:
            msg = f"{codes.file}: {codes.key} has no {key} beside it: codes without scales"
            raise CorruptFileError(msg)
        return found

    def _number(self, key: str, codes: Entry) -> float:
        """A scale of the whole tensor."""
        entry = self._needed(key, codes)
        if entry.dtype != "F32" or entry.nbytes != 4:
            msg = f"{entry.file}: {key} is {entry.dtype} {list(entry.shape)}: one F32 is needed"
            raise CorruptFileError(msg)
        self.parts.add(key)
        value = float(self._source.read_bytes(key).view("<f4")[0])
        if not np.isfinite(value) or value <= 0:
            msg = f"{entry.file}: {key} is {value}: a scale is positive"
            raise CorruptFileError(msg)
        return value


def _matrix(codes: Entry, scales: Entry, size: int, dtype: str) -> tuple[int, ...]:
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.shape else (0,)
    _check(codes, codes.shape, scales, dtype, (*shape[:-1], shape[-1] // size))
    if shape[-1] % size:
        msg = f"{codes.file}: {codes.key} has rows of {shape[-1]} values, no blocks of {size}"
        raise CorruptFileError(msg)
    return shape


def _check(
    codes: Entry, codes_shape: tuple[int, ...], scales: Entry, dtype: str, shape: tuple[int, ...]
) -> None:
    if codes.shape != codes_shape or scales.dtype != dtype or scales.shape != shape:
        msg = (
            f"{codes.file}: {codes.key} {list(codes.shape)} and {scales.key} {scales.dtype} "
            f"{list(scales.shape)} do not fit each other: {dtype} {list(shape)} is needed"
        )
        raise CorruptFileError(msg)


def as_dense(weight: BlockWeight, source: Source, places: Places, dtype: str) -> Outcome:
    """The weight as dense values."""
    shape = weight.shape
    if weight.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    blocks = Blocks(
        codes=places.span(weight.codes),
        scales=places.span(weight.scales),
        blocksize=32 if weight.kind == "mxfp4" else 16,
        scale="e8m0" if weight.kind == "mxfp4" else "e4m3",
        factor=weight.factor,
        divisor=weight.divisor,
    )
    step = Step(
        dense_piece(weight.name, dtype, shape),
        blocks,
        shape=weight.shape,
        transposed=weight.transposed,
    )
    tensor = _tensor(weight, source)
    return Outcome(
        tensor, weight.name, tensor.file, shape, dtype, None, DEQUANTIZED, (step,), _why(weight)
    )


def as_codes(weight: BlockWeight, source: Source, places: Places, dtype: str) -> Outcome:
    """The weight with its codes, in qkern's order, and its scales as fp32: nothing is lost."""
    pieces = weight_pieces(weight.name, weight.shape, dtype, MXFP4)
    steps = (
        Step(pieces.codes, places.span(weight.codes), change="swapped_nibbles"),
        Step(pieces.scales, places.span(weight.scales), change="e8m0_to_float32"),
        *(Step(table, None) for table in pieces.tables),
    )
    tensor = _tensor(weight, source)
    reason = "(experts, out, in), as in the file" if weight.transposed else ""
    return Outcome(
        tensor, weight.name, tensor.file, weight.shape, dtype, MXFP4, CARRIED, steps, reason
    )


def holds_transposed(tensor: StoredTensor, model_type: object) -> bool:
    """Whether a weight that ``as_codes`` wrote is the transpose of what transformers holds."""
    is_mxfp4 = tensor.format is not None and tensor.format.quant_type == MXFP4.quant_type
    return is_mxfp4 and len(tensor.shape) == 3 and model_type == "gpt_oss"


def dropped(tensor: StoredTensor) -> Outcome:
    """A scale of activations."""
    return Outcome(
        *(tensor, tensor.name, tensor.file, (0,), tensor.dtype, None, LEFT_OUT, ()),
        "a scale of activations or caches: dense weights have none",
    )


def check_carried(source: Source, weights: Mapping[str, BlockWeight]) -> None:
    """Refuse to carry what qkern's scales would not hold exactly.

    Raises:
        FormatError: for NVFP4, with the way.
    """
    other = next((weight for weight in weights.values() if weight.kind != "mxfp4"), None)
    if other is not None:
        msg = (
            f"{source.path}: {other.name} is {other.kind}: its scales are products, which fp32 "
            "may have to round; convert it to a dtype (--to bfloat16), and quantize that if need be"
        )
        raise FormatError(msg)


def _why(weight: BlockWeight) -> str:
    return "transposed, as transformers' class holds it" if weight.transposed else ""


def _tensor(weight: BlockWeight, source: Source) -> StoredTensor:
    file = source.entries[weight.codes].file
    # Its own name for a format that is read here alone.
    return StoredTensor(weight.name, file, weight.shape, weight.kind, None, weight.nbytes)


def leftover(source: Source, found: BlockWeights) -> str:
    """An entry in a format of 8 or fewer bits that is none of these weights; empty if none."""
    known = {*found.by_codes, *found.parts, *found.unused}
    small = ("F8_", "F4", "F6_", "U8", "I8")
    names = (
        key
        for key, entry in source.entries.items()
        if key not in known and entry.dtype.startswith(small) and len(entry.shape) > 1
    )
    return next(names, "")
