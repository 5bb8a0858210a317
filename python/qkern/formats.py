"""How quantized bytes are read: the format, its constants and all size arithmetic. No torch.

A format is a kind (a row of ``KINDS``: table of codes, width, allowed blocks and scales, name in
files), a block size and a kind of scale. How the codes were *chosen* is not part of it (see
``codec``): any bytes of a format decode the same way.

Layout, shared by every back end and by the files:

- blocks of ``blocksize`` values run over the flat row-major tensor, across row ends; the last
  block may be shorter. Of ``int8_row`` a block is a row: all values of the last dimension;
- 4-bit: value ``2 i`` sits in the high nibble of byte ``i``, value ``2 i + 1`` in the low one; an
  odd count is padded with the code of 0.0;
- one fp32 ``absmax`` per block. Double quantization stores it as ``absmax - offset`` in an 8-bit
  dynamic code, in groups of 256 with an fp32 ``nested_absmax`` each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from qkern.errors import FormatError

# Codes of bitsandbytes' 4-bit types, fp32 literals. NF4: quantiles of N(0, 1), Dettmers et al.,
# "QLoRA", https://arxiv.org/abs/2305.14314, appendix E.
NF4: Final[tuple[float, ...]] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
# bitsandbytes' FP4: bit 3 is the sign, magnitudes are divided by 12.
FP4: Final[tuple[float, ...]] = _FP4_MAGNITUDES + tuple(0.0 - m for m in _FP4_MAGNITUDES)

# E2M1, in units of the scale itself: OCP Microscaling Formats (MX) 1.0, section 5.3.3. Its scales
# there are powers of two.
E2M1: Final[tuple[float, ...]] = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE: Final = 256
DTYPES: Final = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class FormatKind:
    """What the name of a format fixes.

    Args:
        bits: of a code, 4 (two in a byte) or 8.
        code: the value of each code, in units of its scale; None for signed integers, in units of
            ``scale / 127``.
        blocksizes: how many values may share a scale; empty where that is a row's length.
        scales: how scales may be stored: "fp32", or "nested" (double quantization).
        state: name of the JSON entry in files; None for bitsandbytes' int8 keys, which have none.
        since: the oldest version of qkern that reads it; empty for what all versions do.
        decode_only: why nothing is quantized to it; empty for what can be.
    """

    bits: int
    code: tuple[float, ...] | None
    blocksizes: tuple[int, ...]
    scales: tuple[str, ...]
    state: str | None
    since: str = ""
    decode_only: str = ""

    @property
    def per_row(self) -> bool:
        """Whether a block is a row, of any length."""
        return not self.blocksizes


KINDS: Final[dict[str, FormatKind]] = {
    "nf4": FormatKind(4, NF4, BLOCKSIZES, ("fp32", "nested"), "bitsandbytes__nf4"),
    "fp4": FormatKind(4, FP4, BLOCKSIZES, ("fp32", "nested"), "bitsandbytes__fp4"),
    "int8": FormatKind(8, None, BLOCKSIZES, ("fp32", "nested"), "qkern__int8"),
    "int8_row": FormatKind(8, None, (), ("fp32",), None),
    "mxfp4": FormatKind(
        4,
        E2M1,
        (32,),
        ("fp32",),
        "qkern__mxfp4",
        since="0.1.0",
        decode_only="its scales are powers of two, which no method here chooses",
    ),
}
# What can be quantized to; others are only read.
QUANT_TYPES: Final = tuple(name for name, kind in KINDS.items() if not kind.decode_only)


@dataclasses.dataclass(frozen=True)
class QuantFormat:
    """How the bytes of a quantized tensor are read.

    Args:
        quant_type: ``"nf4"``, ``"fp4"`` (4 bits a weight), ``"int8"`` (8 bits), ``"int8_row"``
            (8 bits, the layout of bitsandbytes' int8 files), or ``"mxfp4"`` (4 bits, of files that
            were converted; nothing is quantized to it).
        blocksize: values that share a scale, one of 32, 64, ... 4096; an int, or an integer of
            NumPy's, which is kept as an int. For int8_row the length of a row, or 0 until
            ``for_shape`` fills it in; for mxfp4 32.
        double_quant: scales stored in 8 bits instead of 32; False for int8_row and mxfp4, whatever
            is given.

    Raises:
        FormatError: for any other value.

    Example:
        >>> QuantFormat("nf4", blocksize=64).bits_per_weight(4096 * 4096)
        4.126955032348633
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.quant_type not in KINDS:
            msg = f"unknown quant_type {self.quant_type!r}: allowed are {', '.join(QUANT_TYPES)}"
            raise FormatError(msg)
        if not _is_blocksize(self.blocksize, self.kind):
            allowed = ", ".join(map(str, self.kind.blocksizes)) or "a row's length, 0 or more"
            msg = f"blocksize {self.blocksize!r} is not supported: allowed are {allowed}"
            raise FormatError(msg)
        object.__setattr__(self, "blocksize", int(self.blocksize))
        if not isinstance(self.double_quant, bool):
            msg = f"double_quant must be True or False, got {self.double_quant!r}"
            raise FormatError(msg)
        if "nested" not in self.kind.scales:
            object.__setattr__(self, "double_quant", False)

    @property
    def kind(self) -> FormatKind:
        """What the name fixes."""
        return KINDS[self.quant_type]

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        return self.kind.bits

    @property
    def code(self) -> tuple[float, ...] | None:
        """The 16 values of a 4-bit format, in units of absmax; None for int8."""
        return self.kind.code

    @property
    def packed_dtype(self) -> str:
        """Name of the dtype of packed codes."""
        return "int8" if self.kind.code is None else "uint8"

    def check_encodes(self) -> None:
        """Refuse a format that is only read.

        Raises:
            FormatError: with the reason.
        """
        if self.kind.decode_only:
            msg = (
                f"nothing is quantized to {self.quant_type}: {self.kind.decode_only}; choose one "
                f"of {', '.join(QUANT_TYPES)}"
            )
            raise FormatError(msg)

    def for_shape(self, shape: Sequence[int]) -> QuantFormat:
        """The format of a tensor of ``shape``: of int8_row, ``blocksize`` becomes a row's length.

        Fewer than 2 dimensions are one row. Rows without values count as 1 long: there are none
        of their scales either.
        """
        if not self.kind.per_row:
            return self
        return self.replace(blocksize=max(int(shape[-1]), 1) if len(shape) else 1)

    @property
    def template(self) -> QuantFormat:
        """The format as it was asked for, before ``for_shape``: the same for every shape."""
        return self.replace(blocksize=0) if self.kind.per_row else self

    def num_blocks(self, numel: int) -> int:
        """Blocks, and so scales, of a tensor of ``numel`` values.

        Raises:
            FormatError: for int8_row without the length of a row.
        """
        if self.blocksize == 0:
            msg = f"{self.quant_type} has a scale a row: for_shape(shape) fills in its length"
            raise FormatError(msg)
        return -(-numel // self.blocksize)

    def num_nested(self, numel: int) -> int:
        """Second-level scales of a tensor of ``numel`` values; 0 without double quantization."""
        return -(-self.num_blocks(numel) // NESTED_BLOCKSIZE) if self.double_quant else 0

    def packed_size(self, numel: int) -> int:
        """Bytes of the codes of a tensor of ``numel`` values."""
        return numel if self.bits == 8 else (numel + 1) // 2

    def nbytes(self, numel: int) -> int:
        """Bytes of codes and scales of a tensor of ``numel`` values."""
        blocks = self.num_blocks(numel)
        scales = blocks + 4 * self.num_nested(numel) + 4 if self.double_quant else 4 * blocks
        return self.packed_size(numel) + scales

    def bits_per_weight(self, numel: int) -> float:
        """Bits of codes and scales per value of a tensor of ``numel`` values."""
        return 8 * self.nbytes(numel) / numel

    def rows_are_blocks(self, in_features: int) -> bool:
        """Whether no block crosses a row of ``in_features`` values."""
        return in_features > 0 and in_features % self.blocksize == 0

    def replace(self, **changes: object) -> QuantFormat:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def resolve_format(
    quant_type: str | QuantFormat, *, blocksize: int = 64, double_quant: bool = True
) -> QuantFormat:
    """The format that a caller named; a ``QuantFormat`` in place of the name decides alone.

    Args:
        quant_type: a name of ``QUANT_TYPES``, or a format.
        blocksize: values that share a scale; unused by int8_row, whose rows do.
        double_quant: store the scales in 8 bits; unused by int8_row, whose scales are fp32.

    Raises:
        FormatError: for a format that does not exist, or that is only read.
    """
    if isinstance(quant_type, QuantFormat):
        fmt = quant_type
    elif quant_type in KINDS and KINDS[quant_type].per_row:
        fmt = QuantFormat(quant_type, 0, double_quant)
    elif quant_type in KINDS and KINDS[quant_type].decode_only:
        fmt = QuantFormat(quant_type, KINDS[quant_type].blocksizes[0], double_quant)
    else:
        fmt = QuantFormat(quant_type, blocksize, double_quant)
    fmt.check_encodes()
    return fmt


def _is_blocksize(value: object, kind: FormatKind) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        return False
    return bool(value >= 0) if kind.per_row else value in kind.blocksizes


@functools.cache
def dynamic_code() -> tuple[float, ...]:
    """The 256 values, ascending, that a double-quantized scale can take, in units of its group.

    bitsandbytes' signed dynamic map: decade ``10^(i - 6)``, ``i = 0..6``, holds the ``2^i`` means
    of neighbouring points of ``linspace(0.1, 1, 2^i + 1)``, with both signs; then 0 and 1 (there
    is no -1). Dettmers et al., "8-bit Optimizers", https://arxiv.org/abs/2110.02861, section 2.1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        means = _decade_means(2**i) * np.float32(10.0 ** (i - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


def _decade_means(count: int) -> npt.NDArray[np.float32]:
    """Means of neighbouring points of ``linspace(0.1, 1, count + 1)`` in fp32.

    As torch computes them, since the table is fixed to the bit: stepped from both ends, each
    point rounded once (a fused multiply-add; here the product is exact in fp64).
    """
    start, stop = np.float32(0.1), np.float32(1.0)
    step = np.float64((stop - start) / np.float32(count))
    i = np.arange(count + 1)
    exact = np.where(i < (count + 1) // 2, start + step * i, stop - step * (count - i))
    points = exact.astype(np.float32)
    means: npt.NDArray[np.float32] = (points[:-1] + points[1:]) / np.float32(2)
    return means
