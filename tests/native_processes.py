"""A9, D25, D26, D28: native calls in processes of their own (run by test_native.py)."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from native_calls import (
    CANNOT_RUN,
    NF4,
    main,
    pool_threads,
    quantize_4bit,
    small_result,
    when_running,
    zeros,
)

import qkern
from qkern import _native

# -- D25 --


def allow_forks() -> None:
    """Python 3.12 and later warn of every fork of a process with threads: the subject here."""
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)


def fork() -> dict[str, int]:
    """Exit statuses of children forked after the pool has run and amid its work; 0 for right."""
    allow_forks()
    expected = small_result(threads=2)

    def right() -> bool:
        same = small_result(threads=2) == expected
        while pool_threads() == 0:  # a call does not wait for new threads to start; the alarm does
            time.sleep(0.001)
        return same

    def right_and_grandchild_right() -> bool:
        return right() and exit_status(right) == 0

    statuses = {"child": exit_status(right), "grandchild": exit_status(right_and_grandchild_right)}
    call, out = quantize_4bit(1 << 36)

    def amid_work() -> None:
        statuses["amid work"] = exit_status(right)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = when_running(out, amid_work)
    try:
        call(threads=2)
    except KeyboardInterrupt:
        watcher.join()
    statuses["parent"] = 0 if right() else 1
    return statuses


def exit_status(check: Callable[[], bool]) -> int:
    """0 if ``check`` is true in a forked child; minus the signal that ended it, after 10 s."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Quantizing:
    """A data set whose items are quantized where they are read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        values = np.random.default_rng(index).standard_normal((1 << 21) + 64).astype(np.float32)
        q = qkern.quantize(values)
        return os.getpid(), q.packed.tobytes() + qkern.dequantize(q).tobytes()


def loader() -> dict[str, list[bool]]:
    """Whether workers of a ``DataLoader`` read what this process reads."""
    from torch.utils.data import DataLoader

    allow_forks()
    expected = [bytes_ for _, bytes_ in map(Quantizing().__getitem__, range(4))]
    same = {}
    for context in ("fork", "spawn"):
        batches = DataLoader(
            Quantizing(),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=2,
            multiprocessing_context=context,
            timeout=120,
        )
        items = list(batches)
        assert len({pid for pid, _ in items} - {os.getpid()}) == 2
        same[context] = [got == wanted for (_, got), wanted in zip(items, expected, strict=True)]
    return same


# -- D26 --


def sub_interpreter() -> str:
    """What a second interpreter in this process is told when it imports the extension."""
    try:
        import _interpreters as interpreters  # type: ignore[import-not-found]  # Python 3.13
    except ImportError:
        import _xxsubinterpreters as interpreters  # type: ignore[import-not-found]
    read, write = os.pipe()
    code = f"""if True:
        import os, sys
        sys.path[:] = {sys.path!r}
        try:
            import qkern._native
        except ImportError as error:
            os.write({write}, str(error).encode())
        else:
            os.write({write}, b"imported")
    """
    interpreters.run_string(interpreters.create(), code)
    return os.read(read, 10_000).decode()


# -- D28 --


def uncaught_panic() -> None:
    _native._panic("a bug on purpose", threads=2)


def caught_panics() -> list[bool]:
    """Whether each of 8 threads that panic at once sees its own panic."""
    expected, seen = small_result(), [False] * 8

    def panic(i: int) -> None:
        try:
            _native._panic(f"panic {i} of 8", threads=i % 3)
        except Exception as error:  # what anyone would catch
            seen[i] = f"panic {i} of 8" in str(error)

    threads = [threading.Thread(target=panic, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [*seen, small_result() == expected]


# -- A9 --

LARGE = (1 << 31) + 65_536 + 33  # the last block is ragged, the count odd
# Where values begin that are not 0: two blocks at the start, across 2^31, and at the end.
MARKS = (0, (1 << 31) - 64, LARGE - 97)


def marked(mark: int) -> np.ndarray:
    """The bfloat16 bit patterns of the values from ``mark`` on."""
    count = min(128, LARGE - mark)
    normal = np.random.default_rng(count + mark).standard_normal(count).astype(np.float32)
    return (normal.view(np.uint32) >> 16).astype(np.uint16)


def large_values() -> np.ndarray:
    """``LARGE`` bfloat16 values, all but the marked ones 0.

    In anonymous memory rather than a sparse file: pages of zeros that are only read cost nothing,
    where those of a file would fill the page cache.
    """
    values = zeros(LARGE, np.uint16)
    for mark in MARKS:
        values[mark : mark + 128] = marked(mark)
    return values


def large_quantize(path: str) -> dict[str, float]:
    """Saves the bytes of the marked values; says whether all others are the code of 0."""
    check_memory(2)
    packed, absmax = large_nf4()
    saved = {}
    for mark in MARKS:
        part = slice(mark // 2, mark // 2 + 64)
        saved[f"packed {mark}"] = packed[part].copy()
        saved[f"absmax {mark}"] = absmax[mark // 64 : mark // 64 + 2]
        packed[part] = 0x77
    np.savez(path, **saved)
    others_are_zero = bool(packed.min() == packed.max() == 0x77)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak_gib": peak, "others_are_zero": others_are_zero}


def large_nf4() -> tuple[np.ndarray, np.ndarray]:
    packed, absmax = zeros((LARGE + 1) // 2, np.uint8), zeros(-(-LARGE // 64), np.float32)
    _native.quantize_4bit(large_values(), "bfloat16", NF4, 64, packed, absmax)
    return packed, absmax


def large_round_trip(path: str) -> None:
    """Saves what the marked values came back as from NF4 and int8, and the largest other bits."""
    check_memory(8)
    saved, back = {}, zeros(LARGE, np.uint16)
    for quant_type in ("nf4", "int8"):
        if quant_type == "nf4":
            packed, absmax = large_nf4()
            _native.dequantize_4bit(packed, absmax, NF4, 64, back, "bfloat16")
        else:
            packed, absmax = zeros(LARGE, np.int8), zeros(-(-LARGE // 64), np.float32)
            _native.quantize_int8(large_values(), "bfloat16", 64, packed, absmax)
            _native.dequantize_int8(packed, absmax, 64, back, "bfloat16")
        del packed
        for mark in MARKS:
            saved[f"{quant_type} {mark}"] = back[mark : mark + 128].copy()
            back[mark : mark + 128] = 0
        saved[f"{quant_type} others"] = back.max()
    np.savez(path, **saved)


def available_memory() -> int:
    """Bytes that Linux would give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def check_memory(gigabytes: int) -> None:
    free = available_memory()
    if free < gigabytes << 30:
        print(f"needs {gigabytes} GiB of free memory, there are {free / 2**30:.1f}")
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main(globals())
