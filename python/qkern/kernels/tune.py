"""Configs that were timed on the machine at hand: which to try, how, and where they are kept.

A file in the user's cache for each GPU and each version of triton and qkern holds rows as those of
``configs``, with the shape that each was timed for; ``dispatch.choose`` takes them first. It is
written by ``qkern.ops.tuning`` when asked, and never otherwise. A file that is damaged, or is of
something else, is ignored with a warning.

Tokens are rounded up to a power of 2, the bucket: a row serves the tokens of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

import qkern
from qkern.formats import QuantFormat
from qkern.kernels import dispatch, launch
from qkern.kernels.dispatch import Config, choose

# Times a run of a product: seconds, or any unit.
Timer = Callable[[Callable[[], object]], float]
# A product that no kernel makes: the weight is dequantized and multiplied by torch.
DENSE = "dense"
# What a change must gain; less is noise.
_GAIN = 0.98
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


class Tuned:
    """Rows of one machine."""

    def __init__(self, rows: Mapping[tuple[int, int, int, int], Config]) -> None:
        self.rows = dict(rows)

    def find(self, bits: int, M: int, N: int, K: int) -> Config | None:
        """The row for M tokens of ``bits`` and a weight (N, K), if there is one."""
        return self.rows.get((bits, bucket(M), N, K))


def bucket(tokens: int) -> int:
    """The power of 2 from ``tokens`` on."""
    return 1 << max(tokens - 1, 0).bit_length()


def cache_directory() -> Path:
    """Where the system wants what can be made again: QKERN_CACHE_DIR, else the user's cache.

    Raises:
        RuntimeError: if the user has no home.
    """
    if own := os.environ.get("QKERN_CACHE_DIR"):
        return Path(own)
    system = platform.system()
    if system == "Windows":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "qkern" / "Cache"
    if system == "Darwin":
        return Path.home() / "Library" / "Caches" / "qkern"
    # https://specifications.freedesktop.org/basedir-spec: relative paths are to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "qkern"


def key_of(device: torch.device) -> dict[str, str]:
    """What rows depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "triton": triton.__version__, "qkern": qkern.__version__}


def path_of(key: Mapping[str, str]) -> Path:
    """The file of a machine."""
    parts = (re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in key.values())
    return cache_directory() / f"tuned_{'_'.join(parts)}.json"


def content_of(key: Mapping[str, str], rows: Mapping[Any, Config]) -> dict[str, Any]:
    """What the file of a machine holds."""
    found = [dataclasses.asdict(row) for row in rows.values()]
    return {"key": dict(key), "rows": found}


def read(key: Mapping[str, str]) -> Tuned:
    """The rows of a machine; none if there is no file, or with a warning if it is no good."""
    try:
        path = path_of(key)
        text = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            _warn(path_of(key), str(error))
        return Tuned({})
    try:
        content = json.loads(text)
        if content["key"] != dict(key):
            _warn(path, f"it was made for {content['key']}")
            return Tuned({})
        rows = [_row(row) for row in content["rows"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        _warn(path, f"{type(error).__name__}: {error}")
        return Tuned({})
    return Tuned({(row.bits, row.tokens, *shape_of(row)): row for row in rows})


def shape_of(row: Config) -> tuple[int, int]:
    """(N, K) that a row was timed for."""
    assert row.shape is not None
    return row.shape


@functools.lru_cache(maxsize=64)
def tuned_of(device: torch.device) -> Tuned | None:
    """The rows of a device, read once; None where there cannot be any."""
    return read(key_of(device)) if device.type == "cuda" else None


def _warn(path: Path, why: str) -> None:
    warnings.warn(
        f"the tuned configs in {path} are ignored: {why}; delete the file, or run qkern tune again",
        stacklevel=2,
    )


def _row(row: Any) -> Config:
    """A row of a file, checked: it decides what is compiled and launched.

    Raises:
        ValueError: for anything that no kernel could be launched with.
        TypeError: for other entries than those of ``Config``.
    """
    found = Config(**row)
    found = found.replace(tile=tuple(found.tile), shape=tuple(found.shape or ()))
    BM, BN, BK = found.tile
    numbers = (*found.tile, *shape_of(found), found.bits, found.tokens, found.warps, found.stages)
    if any(type(number) is not int or number < 1 for number in (*numbers, found.split + 1)):
        msg = f"no whole numbers above 0: {row}"
        raise ValueError(msg)
    small = found.op == "matvec"
    fits = (
        (found.op in {"matvec", "matmul_small", "matmul", DENSE})
        and (found.bits in {16, 32} and len(shape_of(found)) == 2)
        and (bucket(found.tokens) == found.tokens and isinstance(found.ahead, bool))
        and all(side & (side - 1) == 0 for side in (BN, BK, found.warps))
        and (BM <= 4 if small else 16 <= BM <= 256 and BM & (BM - 1) == 0)
        and (32 <= BK <= 4096 if small else 16 <= min(BN, BK) and max(BN, BK) <= 256)
        and (BN <= 256 and found.warps <= 16 and found.stages <= 8)
        and (found.split <= _SPLITS[-1] and (found.split > 0 or found.op != "matmul_small"))
    )
    if not fits:
        msg = f"no kernel runs so: {row}"
        raise ValueError(msg)
    return found


def best(
    device: torch.device, dtype: torch.dtype, tokens: int, N: int, K: int, timer: Timer
) -> tuple[Config, float, float]:
    """The fastest way to multiply ``tokens`` tokens, what it takes, and what the shipped one takes.

    Tiles first, with programs shared as usual, then how many programs share a tile. The shipped
    config stays unless another gains more than noise.

    Args:
        device: where to time.
        dtype: of x: float32, float16 or bfloat16.
        tokens: a bucket.
        N: out_features of a weight in NF4.
        K: in_features.
        timer: of a run.

    Raises:
        RuntimeError: if not even the shipped way runs.
    """
    arch, processors, bits = launch.arch(device), launch.processors(device), dtype.itemsize * 8
    shipped = choose(arch, processors, bits, tokens, N, K)
    dense = Config(DENSE, bits, tokens, (16, 16, 16), 4, 1)
    x, weight = _operands(device, dtype, tokens, N, K)
    fastest, before = shipped or dense, 0.0
    seconds = before = timer(_product(x, weight, fastest))

    def keep(candidates: Iterator[Config]) -> None:
        nonlocal fastest, seconds
        for candidate in candidates:
            try:
                found = timer(_product(x, weight, candidate))
            except (triton.TritonError, RuntimeError):  # too large for this GPU
                continue
            if found < seconds * _GAIN:
                fastest, seconds = candidate, found

    if shipped is not None and shipped.op == "matvec":
        keep(_vectors(shipped))
    else:
        keep(_tiles(arch, processors, bits, tokens, N, K))
        if fastest.op != DENSE:
            keep(_splits(fastest, K))
        if shipped is not None:
            keep(iter([dense]))
    return fastest.replace(tokens=tokens, shape=(N, K)), seconds, before


def _vectors(shipped: Config) -> Iterator[Config]:
    M = shipped.tile[0]
    for BN in (4, 8, 16, 32):
        for BK in (512, 1024, 2048):
            for warps in (4, 8):
                if 4096 <= BN * BK <= 32768:
                    yield shipped.replace(tile=(M, BN, BK), warps=warps)


def _tiles(arch: str, processors: int, bits: int, M: int, N: int, K: int) -> Iterator[Config]:
    largest = max(min(bucket(M), 256), 16)
    for BM in {largest, max(largest // 2, 16)}:
        for BN in (32, 64, 128):
            for BK in (32,) if bits == 32 else (64, 128) if BM == 16 else (64,):
                for stages in (2, 3):
                    for ahead in (True, False):
                        if ahead and BM * BN > 128 * 64:  # it has no registers left
                            continue
                        warps = 4 if BM * BN <= 64 * 64 else 8
                        row = Config("matmul", bits, M, (BM, BN, BK), warps, stages, ahead)
                        row = row.replace(op="matmul_small") if M <= 64 else row
                        yield dispatch.fitted(row, processors, M, N, K)


def _splits(config: Config, K: int) -> Iterator[Config]:
    for split in _SPLITS:
        if split <= max(-(-K // config.tile[2]) // 2, 1):
            yield config.replace(op="matmul_small" if split > 1 else "matmul", split=split)


def _operands(
    device: torch.device, dtype: torch.dtype, M: int, N: int, K: int
) -> tuple[Tensor, launch.Weight]:
    """Random tokens, and a random weight in NF4 with 8-bit scales."""
    fmt = QuantFormat("nf4", 64)
    blocks, groups = fmt.num_blocks(N * K), fmt.num_nested(N * K)
    packed = torch.randint(256, (fmt.packed_size(N * K),), dtype=torch.uint8, device=device)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    nested, offset = torch.ones(groups, device=device), torch.zeros(1, device=device)
    x = torch.randn(M, K, dtype=dtype, device=device)
    return x, launch.weight(packed, absmax, nested, offset, fmt, (N, K))


def _product(x: Tensor, weight: launch.Weight, config: Config) -> Callable[[], object]:
    """A run of the product by a config."""
    from qkern.kernels.dequantize import dequantize
    from qkern.kernels.linear import linear

    N, K = weight.out_features, weight.in_features

    def densely() -> Tensor:
        packed, absmax, nested, offset, _ = weight.pointers
        dense = dequantize(packed, absmax, nested, offset, weight.fmt, N * K, x.dtype)
        return torch.nn.functional.linear(x, dense.view(N, K))

    return densely if config.op == DENSE else lambda: linear(x, weight, config=config)


def median_milliseconds(run: Callable[[], object]) -> float:
    """Of many runs on the current device, each after L2 was emptied."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
