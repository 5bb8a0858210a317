"""What every launch needs: checks, the operands of a weight, the device, workspace.

Nothing here waits for the device. The first call on a device copies the tables of codes to it, and
compiles: capture CUDA graphs after a warm-up call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from qkern.errors import DeviceError, DTypeError, ShapeError
from qkern.formats import QuantFormat, dynamic_code
from qkern.kernels import lasting
from qkern.kernels.rounding import INTERPRETED, VERSION

# Options of every launch: a product that is fused into a sum is rounded once instead of twice.
EXACT = {"enable_fp_fusion": False}
# Where that does not matter; said too, for Triton is about to change what it does by itself.
FUSED = {"enable_fp_fusion": True}
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Whether a kernel may take a tuple of tensors for one argument.
TAKES_TUPLES = VERSION >= (3, 3)
# Counters of one stream: split products have at most so many tiles.
COUNTERS = 1 << 16
# Those of all graphs on a device: 4 MiB.
GRAPH_COUNTERS = 1 << 20
# Indices of blocks are int64, those of rows, columns and tokens int32.
LARGEST = 2**31 - 1


class Weight(NamedTuple):
    """A quantized matrix (out_features, in_features) as the kernels take it.

    Made by ``weight``, which checks it. Rows are whole blocks.
    """

    # packed, absmax, nested_absmax, offset, tables: arguments of a kernel, in this order. The third
    # and fourth are any tensor if scales are fp32.
    pointers: tuple[Tensor, ...]
    out_features: int
    in_features: int
    fmt: QuantFormat

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.pointers[0].device

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments BITS, BLOCKSIZE (0: a scale a row), DOUBLE_QUANT and LOOKUP."""
        return {
            "BITS": self.fmt.bits,
            "BLOCKSIZE": 0 if self.fmt.kind.per_row else self.fmt.blocksize,
            "DOUBLE_QUANT": self.fmt.double_quant,
            "LOOKUP": lookup(self.device),
        }


def fits(fmt: QuantFormat, shape: Sequence[int]) -> bool:
    """Whether kernels can multiply a weight of ``shape`` without a dense copy.

    Rows must be whole blocks, and hold values; nibbles of a byte must be of one row.
    """
    if len(shape) != 2 or 0 in shape or max(shape) > LARGEST:
        return False
    return fmt.rows_are_blocks(shape[1]) and (fmt.bits == 8 or shape[1] % 2 == 0)


def weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    fmt: QuantFormat,
    shape: Sequence[int],
) -> Weight:
    """The parts of a quantized weight, checked.

    Args:
        packed: uint8 (ceil(N K / 2),) or int8 (N K,), any shape.
        absmax: fp32 or uint8 (blocks,), any shape.
        nested_absmax: fp32 (groups,) or None.
        offset: fp32 (1,) or None.
        fmt: how the bytes are read.
        shape: (N, K), for which ``fits`` holds.

    Raises:
        ShapeError: if rows are not whole blocks, or a part has another size.
        DeviceError: for parts on several devices.
    """
    if not fits(fmt, shape):
        msg = (
            f"no kernel multiplies {fmt.quant_type} of shape {tuple(shape)} in blocks of"
            f" {fmt.blocksize}: rows must be whole blocks; dequantize it instead"
        )
        raise ShapeError(msg)
    numel = shape[0] * shape[1]
    given = (packed, absmax, nested_absmax, offset)
    double_quant = nested_absmax is not None
    fmt = fmt if fmt.double_quant == double_quant else fmt.replace(double_quant=double_quant)
    nested = (fmt.num_nested(numel), 1) if double_quant else (None, None)
    names = ("packed", "absmax", "nested_absmax", "offset")
    sizes = (fmt.packed_size(numel), fmt.num_blocks(numel), *nested)
    for name, part, size in zip(names, given, sizes, strict=True):
        if part is not None and part.numel() != size:
            msg = f"{name} has {part.numel()} values, a weight of {tuple(shape)} has {size}"
            raise ShapeError(msg)
    tables = tables_of(fmt.code, packed.device)
    parts = [tables if part is None else aligned(part) for part in given]
    same_device(*parts)
    return Weight((*parts, tables), shape[0], shape[1], fmt)


def operand(x: Tensor, columns: int, name: str) -> Tensor:
    """``x`` (..., columns) as (rows, columns): contiguous, and at a multiple of 16 bytes.

    Raises:
        ShapeError: for another number of columns, or more rows than an int32 counts.
        DTypeError: for any dtype but float32, float16 and bfloat16.
    """
    if x.dim() == 0 or x.shape[-1] != columns:
        msg = f"{name} has shape {tuple(x.shape)}: the last dimension must be {columns}"
        raise ShapeError(msg)
    if x.dtype not in TL_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in TL_DTYPES)
        msg = f"{name} has dtype {x.dtype}: kernels take {allowed}; cast it first"
        raise DTypeError(msg)
    rows = x.reshape(-1, columns) if columns else x.reshape(x.shape[:-1].numel(), 0)
    if rows.shape[0] > LARGEST:
        msg = f"{name} has {rows.shape[0]} rows, kernels count to {LARGEST}: split the batch"
        raise ShapeError(msg)
    return aligned(rows)


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy: contiguous, at a multiple of 16 bytes. Codes are read as words."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def epilogue(
    x: Tensor, bias: Tensor | None, h: Tensor | None, lora_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments bias, h and B of a product; x in place of those that are not there."""
    return tuple(x if tensor is None else tensor for tensor in (bias, h, lora_B))  # type: ignore[return-value]


def product_constants(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_B: Tensor | None, BK: int
) -> dict[str, Any]:
    """The constants of a product that do not come from its tile.

    They are ``weight.constants`` and HAS_BIAS, RANK, BR (ranks of a step), PRECISION (of an
    adapter in fp32), EVEN_K.
    """
    rank = 0 if lora_B is None else lora_B.shape[1]
    thrice = weight.constants["LOOKUP"] == "shuffle" and x.dtype != torch.float32
    return {
        **weight.constants,
        "HAS_BIAS": bias is not None,
        "RANK": rank,
        "BR": rank_step(rank),
        "PRECISION": "tf32x3" if thrice else "ieee",
        "EVEN_K": weight.in_features % BK == 0,
    }


def rank_step(rank: int) -> int:
    """Ranks that are multiplied at once: a power of 2, at least the depth of a tensor core."""
    return min(max(1 << max(rank - 1, 0).bit_length(), 16), 64)


def same_device(*tensors: Tensor) -> None:
    """Refuse tensors of several devices.

    Raises:
        DeviceError: naming the devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        msg = f"tensors of one product are on {names}: move them to one device"
        raise DeviceError(msg)


def lookup(device: torch.device) -> str:
    """How codes are looked up on ``device``, see ``decode``."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return "shuffle" if is_nvidia and not INTERPRETED.value else "table"


@functools.lru_cache(maxsize=64)
def arch(device: torch.device) -> str:
    """The name of a device's architecture in ``aot.ARCHS``; "" for those without one."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros, (count,) or more, for programs of one launch to count themselves.

    A launch leaves them at zero. Kept for each device and stream, on which launches follow each
    other. A launch under capture gets its own, for good: its graph may run beside other streams.
    They were zeros before, so that no graph has to set them; when there are no more, it does.

    Raises:
        ShapeError: for more than ``COUNTERS``.
    """
    if count > COUNTERS:
        msg = f"a split product of {count} tiles: at most {COUNTERS} are counted; do not split it"
        raise ShapeError(msg)
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        own = _FOR_GRAPHS[device].take(count) if device in _FOR_GRAPHS else None
        return torch.zeros(count, dtype=torch.int32, device=device) if own is None else own
    if device not in _FOR_GRAPHS:  # torch waits for the device before it captures
        _FOR_GRAPHS.setdefault(device, _ForGraphs(device))
    return _counters(device, torch.cuda.current_stream(device).cuda_stream)


class _ForGraphs:
    """Zeros on a device, of which each launch under capture takes some."""

    def __init__(self, device: torch.device) -> None:
        zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        self.zeros, self.used = lasting(device, lambda: zeros(GRAPH_COUNTERS)), 0
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor | None:
        """int32 (count,), at a multiple of 128 bytes; None if there are no more."""
        with self.lock:
            first = self.used
            if first + count > GRAPH_COUNTERS:
                return None
            self.used += -(-count // 32) * 32
        return self.zeros[first : first + count]


_FOR_GRAPHS: dict[torch.device, _ForGraphs] = {}


@functools.lru_cache(maxsize=256)
def _counters(device: torch.device, stream: int) -> Tensor:
    return lasting(device, lambda: torch.zeros(COUNTERS, dtype=torch.int32, device=device))


@functools.lru_cache(maxsize=64)
def tables_of(code: tuple[float, ...] | None, device: torch.device) -> Tensor:
    """fp32 (272,): the values of 4-bit codes (zeros for None), then those of 8-bit scales."""
    values = (*(code or (0.0,) * 16), *dynamic_code())
    return lasting(device, lambda: torch.tensor(values, dtype=torch.float32, device=device))
