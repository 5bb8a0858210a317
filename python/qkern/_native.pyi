from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

# Arrays are 1-D and C-contiguous. Values travel as float32, or as uint16 bit patterns of the
# 16-bit dtype that `dtype` names.
_Values: TypeAlias = npt.NDArray[Any]
_F32: TypeAlias = npt.NDArray[np.float32]
_U8: TypeAlias = npt.NDArray[np.uint8]
_I8: TypeAlias = npt.NDArray[np.int8]

@final
class Buffer:
    @property
    def size(self) -> int: ...
    def __new__(cls, address: int, numel: int, dtype: str, owner: object) -> Buffer: ...

__version__: str

def quantize_4bit(
    values: _Values | Buffer,
    dtype: str,
    code: _F32,
    blocksize: int,
    packed: _U8,
    absmax: _F32,
    *,
    nonfinite: str = "error",
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def search_scales(
    values: _Values | Buffer,
    dtype: str,
    code: _F32,
    blocksize: int,
    absmax: _F32,
    *,
    importance: _F32 | Buffer | None = None,
    nonfinite: str = "error",
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def encode_4bit(
    values: _Values | Buffer,
    dtype: str,
    code: _F32,
    blocksize: int,
    absmax: _F32 | Buffer,
    packed: _U8,
    *,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def dequantize_4bit(
    packed: _U8 | Buffer,
    absmax: _F32 | _U8 | Buffer,
    code: _F32,
    blocksize: int,
    values: _Values | Buffer,
    dtype: str,
    *,
    nested_code: _F32 | None = None,
    nested_absmax: _F32 | Buffer | None = None,
    offset: _F32 | Buffer | None = None,
    reused: bool = False,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def quantize_int8(
    values: _Values | Buffer,
    dtype: str,
    blocksize: int,
    packed: _I8,
    absmax: _F32,
    *,
    nonfinite: str = "error",
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def quantize_int8_rows(
    values: _Values | Buffer,
    dtype: str,
    row: int,
    packed: _I8,
    absmax: _F32,
    *,
    nonfinite: str = "error",
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def dequantize_int8(
    packed: _I8 | Buffer,
    absmax: _F32 | _U8 | Buffer,
    blocksize: int,
    values: _Values | Buffer,
    dtype: str,
    *,
    nested_code: _F32 | None = None,
    nested_absmax: _F32 | Buffer | None = None,
    offset: _F32 | Buffer | None = None,
    reused: bool = False,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def quantize_absmax(
    absmax: _F32 | Buffer,
    nested_code: _F32,
    codes: _U8,
    nested_absmax: _F32,
    offset: _F32,
    *,
    threads: int = 0,
) -> bool: ...
def dequantize_absmax(
    codes: _U8 | Buffer,
    nested_code: _F32,
    nested_absmax: _F32 | Buffer,
    offset: _F32 | Buffer,
    absmax: _F32,
    *,
    threads: int = 0,
) -> None: ...
def advise_huge_pages(memory: _U8) -> bool: ...
def linear(
    x: _Values | Buffer,
    dtype: str,
    packed: _U8 | _I8 | Buffer,
    code: _F32 | None,
    absmax: _F32 | _U8 | Buffer,
    nested_code: _F32 | None,
    nested_absmax: _F32 | Buffer | None,
    offset: _F32 | Buffer | None,
    blocksize: int,
    rows: int,
    cols: int,
    y: _Values | Buffer,
    *,
    bias: _F32 | Buffer | None = None,
    lora_a: _Values | Buffer | None = None,
    lora_b: _Values | Buffer | None = None,
    lora_dtype: str = "float32",
    scaling: float = 1.0,
    compute: str = "exact",
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def linear_backward(
    grad: _Values | Buffer,
    dtype: str,
    packed: _U8 | _I8 | Buffer,
    code: _F32 | None,
    absmax: _F32 | _U8 | Buffer,
    nested_code: _F32 | None,
    nested_absmax: _F32 | Buffer | None,
    offset: _F32 | Buffer | None,
    blocksize: int,
    rows: int,
    cols: int,
    dx: _Values | Buffer,
    *,
    lora_a: _Values | Buffer | None = None,
    lora_b: _Values | Buffer | None = None,
    lora_dtype: str = "float32",
    scaling: float = 1.0,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def lora_gradients(
    x: _Values | Buffer,
    grad: _Values | Buffer,
    dtype: str,
    lora_a: _Values | Buffer,
    lora_b: _Values | Buffer,
    lora_dtype: str,
    rank: int,
    scaling: float,
    *,
    grad_a: _F32 | Buffer | None = None,
    grad_b: _F32 | Buffer | None = None,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def run_jobs(
    jobs: Sequence[object],
    inputs: Sequence[str | PathLike[str]],
    outputs: Sequence[str | PathLike[str]],
    nested_code: _F32,
    done: Callable[[tuple[Any, ...]], object],
    progress: Callable[[int], object],
    *,
    threads: int = 0,
    simd: str | None = None,
) -> None: ...
def simd() -> str: ...
def available_simd() -> list[str]: ...
def cpu_features() -> dict[str, bool]: ...
def read_checkpoint(
    path: str | PathLike[str],
) -> tuple[
    list[str],
    list[tuple[str, str, tuple[int, ...], int, int, int]],
    list[dict[str, str]],
    list[tuple[int, int]],
]: ...
def match_paths(pattern: str, paths: list[str]) -> list[bool]: ...
