"""What bounds ``quantize_checkpoint``: reading, writing, quantizing and copying, each alone."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkern import _native
from qkern.codec import code_array


def read_mapped(file: Path, threads: int) -> float:
    """Seconds in which the loop of ``limits.c`` reads a mapped file."""
    import limits  # takes torch, which runs that are measured go without

    loops, whole = limits.library(), np.memmap(file, np.uint8, "r")
    places = np.linspace(0, whole.size // 64 * 64, threads + 1).astype(np.int64) // 64 * 64
    address = whole.ctypes.data

    def part(i: int) -> None:
        begin, end = int(places[i]), int(places[i + 1])
        loops.read_bytes(ctypes.c_void_p(address + begin), end - begin, limits.AHEAD)

    return _on_threads(part, threads)


def read_into_buffers(file: Path, threads: int) -> float:
    """Seconds in which threads read a file into a buffer of 512 KiB each, over and over."""
    size = file.stat().st_size
    handle = os.open(file, os.O_RDONLY)

    def part(i: int) -> None:
        at, end = size * i // threads, size * (i + 1) // threads
        buffer = memoryview(bytearray(1 << 19))
        while at < end:
            at += os.preadv(handle, [buffer], at)

    try:
        return _on_threads(part, threads)
    finally:
        os.close(handle)


def write(folder: Path, nbytes: int, threads: int) -> float:
    """Seconds in which threads write so many bytes to one file, 128 KiB at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    piece = os.urandom(1 << 17)
    handle = os.open(folder / "piece", os.O_WRONLY | os.O_CREAT)
    os.truncate(handle, nbytes)

    def part(i: int) -> None:
        for at in range(i * len(piece), nbytes, threads * len(piece)):
            os.pwrite(handle, piece[: nbytes - at], at)

    try:
        return _on_threads(part, threads)
    finally:
        os.close(handle)
        shutil.rmtree(folder)


def quantize_in_l2(count: int, threads: int) -> float:
    """Seconds in which threads quantize so many bfloat16 values that are in their caches."""
    pool = np.random.default_rng(0).standard_normal(1 << 18, np.float32) * np.float32(0.02)
    values, table = (pool.view(np.uint32) >> 16).astype(np.uint16), code_array("nf4")

    def part(_: int) -> None:
        mine, packed = values.copy(), np.empty(values.size // 2, np.uint8)
        absmax = np.empty(values.size // 64, np.float32)
        for _ in range(count // threads // values.size):
            _native.quantize_4bit(mine, "bfloat16", table, 64, packed, absmax, threads=1)

    return _on_threads(part, threads)


def _on_threads(part: Callable[[int], None], threads: int) -> float:
    workers = [threading.Thread(target=part, args=(i,)) for i in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def copy(file: Path, target: Path) -> float:
    """Seconds of ``cp`` to the folder ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    subprocess.run(["cp", str(file), str(target)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def forget(file: Path) -> None:
    """Drop a file's pages from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
