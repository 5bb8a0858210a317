"""What the workers of test_native.py share: native calls of any length, and how they answer.

A worker is run as a script, ``python WORKER.py NAME``: it runs the function of that name and prints
what it returns as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qkern import _native, codec

NF4 = codec.code_array("nf4")
NESTED = codec.nested_code_array()
# The exit status of a worker that this machine cannot run; it has printed why.
CANNOT_RUN = 77
# Linux' number: Python names it from 3.13 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

Call = Callable[..., object]


def zeros(n: int, dtype: type) -> np.ndarray:
    """Zeros that take no memory before they are written: ``n`` may be more than the machine has."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, n * np.dtype(dtype).itemsize, flags=flags)
    except OSError as error:
        print(f"no room for {n} values in the address space: {error}")
        sys.exit(CANNOT_RUN)
    return np.frombuffer(memory, dtype)


# -- calls that take seconds to minutes if nobody ends them: the call, the array that it writes --


def quantize_4bit(n: int = 1 << 36, **settings: str) -> tuple[Call, np.ndarray]:
    x, packed, absmax = zeros(n, np.uint16), zeros(n // 2, np.uint8), zeros(n // 64, np.float32)
    call = partial(_native.quantize_4bit, x, "bfloat16", NF4, 64, packed, absmax, **settings)
    return call, packed


def dequantize_4bit(n: int = 1 << 35) -> tuple[Call, np.ndarray]:
    packed, absmax, out = zeros(n // 2, np.uint8), zeros(n // 64, np.float32), zeros(n, np.uint16)
    return partial(_native.dequantize_4bit, packed, absmax, NF4, 64, out, "bfloat16"), out


def quantize_int8(n: int = 1 << 36) -> tuple[Call, np.ndarray]:
    x, packed, absmax = zeros(n, np.uint16), zeros(n, np.int8), zeros(n // 64, np.float32)
    return partial(_native.quantize_int8, x, "bfloat16", 64, packed, absmax), packed


def dequantize_int8(n: int = 1 << 35) -> tuple[Call, np.ndarray]:
    packed, absmax, out = zeros(n, np.int8), zeros(n // 64, np.float32), zeros(n, np.uint16)
    return partial(_native.dequantize_int8, packed, absmax, 64, out, "bfloat16"), out


def quantize_absmax(n: int = 1 << 30) -> tuple[Call, np.ndarray]:
    absmax, codes, nested = zeros(n, np.float32), zeros(n, np.uint8), zeros(n // 256, np.float32)
    return partial(
        _native.quantize_absmax, absmax, NESTED, codes, nested, np.empty(1, np.float32)
    ), codes


def dequantize_absmax(n: int = 1 << 35) -> tuple[Call, np.ndarray]:
    codes, nested, absmax = zeros(n, np.uint8), zeros(n // 256, np.float32), zeros(n, np.float32)
    return partial(
        _native.dequantize_absmax, codes, NESTED, nested, np.zeros(1, np.float32), absmax
    ), absmax


OPERATIONS = (
    quantize_4bit,
    dequantize_4bit,
    quantize_int8,
    dequantize_int8,
    quantize_absmax,
    dequantize_absmax,
)


def when_running(out: np.ndarray, action: Call) -> threading.Thread:
    """Calls ``action`` on another thread once a native call has begun to write ``out``."""
    out[0] = 99  # no call here writes this

    def watch() -> None:
        while out[0] == 99:
            time.sleep(0.001)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def small_result(threads: int = 0) -> bytes:
    """What an ordinary call writes; long enough for several threads."""
    values = np.random.default_rng(0).standard_normal((1 << 21) + 64).astype(np.float32)
    packed, absmax = np.zeros(values.size // 2, np.uint8), np.zeros(values.size // 64, np.float32)
    _native.quantize_4bit(values, "float32", NF4, 64, packed, absmax, threads=threads)
    return packed.tobytes() + absmax.tobytes()


def pool_threads() -> int:
    """Threads that the codec has in this process."""
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("qkern-") for name in names)


def exit_above(gibibytes: float) -> None:
    """Ends this process if it grows: a call that does not end when it should takes all memory."""
    page = os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        statm = Path("/proc/self/statm")
        while int(statm.read_text().split()[1]) * page < gibibytes * 2**30:
            time.sleep(0.05)
        os.write(2, b"the call was not interrupted: it has taken too much memory\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(functions: dict[str, Any]) -> None:
    """Runs the function that the command line names, with the rest of it as arguments."""
    name, *arguments = sys.argv[1:]
    print(json.dumps(functions[name](*arguments)))
