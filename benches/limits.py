"""Limits of this machine, by ``limits.c``: memory as the same buffers see it, and tiles.

No NumPy or torch call reads at the speed of memory (their sums are bound by arithmetic), so the
loops are a C file that is compiled here, for this machine, into a temporary directory.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("limits.c")
AHEAD = 2048  # bytes of prefetch: past the page border that the hardware's own stops at


class NoCompilerError(RuntimeError):
    """There is nothing to compile ``limits.c`` with."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops; the call releases the GIL.

    Raises:
        NoCompilerError: if there is no C compiler, or it cannot compile the file.
    """
    named = os.environ.get("CC", "").split() or [next(filter(shutil.which, ("cc", "gcc")), "clang")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "limits.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(out), str(SOURCE)]
        try:
            run = subprocess.run([*named, *options], capture_output=True, text=True, check=False)
        except OSError as error:
            msg = f"{SOURCE.name} needs a C compiler: install one, or name it in CC ({error})"
            raise NoCompilerError(msg) from error
        if run.returncode:
            msg = f"{' '.join(named)} cannot compile {SOURCE.name}: {run.stderr.strip()[:500]}"
            raise NoCompilerError(msg)
        loops = ctypes.CDLL(str(out))  # stays mapped when the file is gone
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loops.read_bytes.argtypes = [pointer, size, size]
    loops.write_bytes.argtypes = [pointer, size, ctypes.c_int]
    loops.copy_bytes.argtypes = [pointer, pointer, size]
    loops.expand_bytes.argtypes = [pointer, pointer, size, size]
    loops.multiply_tiles.argtypes = [size]
    loops.read_bytes.restype = ctypes.c_uint
    loops.has_tiles.restype = ctypes.c_int
    for name in ("write_bytes", "copy_bytes", "expand_bytes", "multiply_tiles"):
        getattr(loops, name).restype = None
    return loops


def reader(*tensors: Tensor, ahead: int = 0) -> Callable[[], object]:
    """Reads all bytes once."""
    places = [(t.data_ptr(), t.nbytes) for t in tensors]

    def run() -> int:
        return functools.reduce(operator.or_, (read(*place, ahead) for place in places))

    read = library().read_bytes
    return _keeping(tensors, run)


def writer(tensor: Tensor) -> Callable[[], object]:
    """Fills the tensor's bytes by non-temporal stores."""
    write = functools.partial(library().write_bytes, tensor.data_ptr(), tensor.nbytes, 0)
    return _keeping(tensor, write)


def copier(to: Tensor, source: Tensor) -> Callable[[], object]:
    """Copies the bytes by non-temporal stores."""
    places = (to.data_ptr(), source.data_ptr(), to.nbytes)
    return _keeping((to, source), functools.partial(library().copy_bytes, *places))


def expander(to: Tensor, source: Tensor) -> Callable[[], object]:
    """Reads ``source`` while ``to``, a whole number of times as long, is filled past the caches.

    Both start at a multiple of 64 bytes, and have whole lines of so many.
    """
    times, rest = divmod(to.nbytes, source.nbytes)
    if rest or to.data_ptr() % 64 or source.nbytes % 64:
        msg = f"{to.nbytes} bytes are no whole number of times {source.nbytes}, or not aligned"
        raise ValueError(msg)
    places = (to.data_ptr(), source.data_ptr(), source.nbytes, times)
    return _keeping((to, source), functools.partial(library().expand_bytes, *places))


def has_tiles() -> bool:
    """Whether this machine multiplies bfloat16 by tiles (AMX)."""
    return bool(library().has_tiles())


def multiplier(M: int, N: int, K: int) -> Callable[[], object]:
    """The tile instructions of a product (M, K) (K, N) in bfloat16, and nothing else.

    Their operands lie in the first cache; a product reads and writes more than that.
    """
    products = math.prod(-(-size // 32) for size in (M, N, K))
    return functools.partial(library().multiply_tiles, products)


def _keeping(owner: object, call: Callable[[], object]) -> Callable[[], object]:
    """The call knows addresses only: the tensors must live as long as it does."""
    vars(call)["owner"] = owner
    return call


def check() -> None:
    """The loops do what they say, at odd places and lengths.

    Raises:
        AssertionError: if they do not.
    """
    source = torch.arange(4096, dtype=torch.int32).view(torch.uint8)
    for start, length in ((0, 16384), (1, 16001), (63, 65), (5, 3)):
        part = source[start : start + length]
        to = torch.full((length + 128,), 7, dtype=torch.uint8)
        inside = to[64 : 64 + length]
        copier(inside, part)()
        writes_elsewhere = bool((to[:64] != 7).any() or (to[64 + length :] != 7).any())
        found = {int(reader(part, ahead=ahead)()) for ahead in (0, AHEAD)}
        expected = functools.reduce(lambda a, b: a | b, part.tolist(), 0)
        same = torch.equal(inside, part)
        writer(inside)()
        if writes_elsewhere or not same or found != {expected} or inside.any():
            msg = f"limits.c is wrong for {length} bytes at {start}: read {found}, copied {same}"
            raise AssertionError(msg)
