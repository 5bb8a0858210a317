"""Products timed on the GPU at hand, so that kernels take the config that was the fastest there.

Never by itself: on request (``tune``, ``qkern tune``), or in a program that was started with
QKERN_TUNE=1, which times each new shape at its first use. The rows go into the user's cache, see
``kernels.tune``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from qkern import files, kernels
from qkern.errors import DeviceError, ShapeError

if TYPE_CHECKING:
    from pathlib import Path

    from qkern.kernels.dispatch import Config
    from qkern.kernels.tune import Timer

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_asked_for = os.environ.get("QKERN_TUNE") == "1"
_tried: set[tuple[object, ...]] = set()


class TunedProduct(NamedTuple):
    """One product, timed.

    Args:
        shape: of the weight, (out_features, in_features).
        tokens: it was timed for, and serves from the power of 2 below.
        op: kernel, or "dense" where the weight is dequantized first.
        tile: of the kernel.
        split: programs that share a tile; 0 or 1 for none.
        seconds: of the fastest config.
        before: seconds of the one that is shipped.
    """

    shape: tuple[int, int]
    tokens: int
    op: str
    tile: tuple[int, int, int]
    split: int
    seconds: float
    before: float


def tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    report: Callable[[TunedProduct], object] | None = None,
) -> tuple[Path, list[TunedProduct]]:
    """Time products of NF4 weights, and keep the fastest config of each in the user's cache.

    A candidate is compiled (some seconds) and timed; up to 30 for each shape and number of tokens.
    The file is written after each, in one piece, so nothing is lost by an interruption. Results of
    kernels stay right whatever is chosen; sums may be taken in another order than before.

    Args:
        shapes: (out_features, in_features) of weights.
        tokens: numbers of rows of x; each is rounded up to a power of 2.
        dtype: of x: bfloat16, float16 or float32.
        device: a GPU with kernels.
        timer: seconds of a run; Triton's benchmark unless given.
        report: is told of each product.

    Returns:
        The file, and what was found.

    Raises:
        DeviceError: if no kernel runs on the device.
        ShapeError: for a shape of whose weight kernels cannot multiply, or no tokens.
    """
    device = _indexed(torch.device(device))
    if why := kernels.why_not(device) if timer is None else "":
        msg = f"nothing to time on {device}: {why}"
        raise DeviceError(msg)
    _check(shapes, tokens, dtype)
    from qkern.kernels import tune as found_here

    key = found_here.key_of(device)
    path = found_here.path_of(key)
    results = []
    for N, K in shapes:
        for count in sorted({found_here.bucket(count) for count in tokens}):
            with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
                config, seconds, before = found_here.best(
                    device, dtype, count, N, K, timer or _benchmark
                )
            _keep(path, key, config)
            row = (config.op, config.tile, config.split)
            results.append(TunedProduct((N, K), count, *row, seconds, before))
            if report is not None:
                report(results[-1])
    found_here.tuned_of.cache_clear()
    return path, results


def tune_if_asked(
    device: torch.device, dtype: torch.dtype, tokens: int, shape: tuple[int, int]
) -> None:
    """Under QKERN_TUNE=1: time this product, unless it was before; not within a CUDA graph.

    Args:
        device: of x.
        dtype: of x.
        tokens: rows of x.
        shape: of the weight, (out_features, in_features).
    """
    if not _asked_for or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    from qkern.kernels.tune import bucket, tuned_of

    count = bucket(tokens)
    product = (device, dtype, count, *shape)
    if product in _tried or dtype not in _DTYPES or not 0 < tokens <= TOKENS[-1]:
        return
    _tried.add(product)
    rows = tuned_of(device)
    if rows is None or rows.find(dtype.itemsize * 8, count, *shape) is None:
        tune([shape], [count], dtype=dtype, device=device)


def _keep(path: Path, key: dict[str, str], config: Config) -> None:
    """Add a row to the file; what another process has added meanwhile stays."""
    from qkern.kernels import tune as found_here

    rows = found_here.read(key).rows
    N, K = found_here.shape_of(config)
    rows[config.bits, config.tokens, N, K] = config
    files.write_json(path, found_here.content_of(key, rows))


def _check(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], dtype: torch.dtype) -> None:
    from qkern.formats import QuantFormat
    from qkern.kernels import launch

    fmt = QuantFormat("nf4", 64)
    bad = [shape for shape in shapes if min(shape) < 1 or not launch.fits(fmt, shape)]
    if bad or not shapes:
        found = f"{bad[0]}" if bad else "none"
        msg = f"shapes are (out_features, in_features), the latter a multiple of 64: got {found}"
        raise ShapeError(msg)
    if not tokens or min(tokens) < 1:
        msg = f"numbers of tokens are 1 or more, got {list(tokens)}"
        raise ShapeError(msg)
    if dtype not in _DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in _DTYPES)
        msg = f"x is {names} in a kernel, got {dtype}"
        raise ShapeError(msg)


def _indexed(device: torch.device) -> torch.device:
    """With its number, as tensors have it: configs are read for each."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _benchmark(run: Callable[[], object]) -> float:
    """Seconds of a run: the median of many, out of a cold L2."""
    from qkern.kernels.tune import median_milliseconds

    return median_milliseconds(run) / 1000
