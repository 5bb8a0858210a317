"""``quantize_checkpoint`` beside reading the files, and beside ``cp``: speed and peak memory.

python benches/bench_checkpoint.py SOURCE_DIR TARGET_DIR [--gib 2.2] [--cold] [--save NAME]

Makes a checkpoint of Llama's shapes with random bfloat16 weights in SOURCE_DIR, and writes to
TARGET_DIR (a tmpfs, to leave the disk out). Linux: it reads /proc and drops pages by posix_fadvise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qkern
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_limits
import harness

GIB = 1 << 30
WEIGHTS = "model.safetensors"
# Address space of the limited run: Python, NumPy and the extension take some 300 MiB of it.
ADDRESS_SPACE = 1 * GIB
VOCABULARY, HIDDEN, INTERMEDIATE, KEYS = 32000, 4096, 14336, 1024
SEVEN_BILLION = 2 * 7_241_732_096  # bytes of Mistral-7B, whose shapes these are
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Mistral-7B cut to about ``nbytes`` in bfloat16: fewer layers, fewer words."""
    words = max(VOCABULARY * nbytes // SEVEN_BILLION, 1)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, HIDDEN)}
    layer = sum(2 * n * k for n, k in LAYER.values())
    for i in range(max(1, round((nbytes - 4 * words * HIDDEN) / layer))):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
        found[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (words, HIDDEN)}


def make(folder: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write a checkpoint of random weights, one file; the path of that."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, bits.size)
                file.write(bits[:count].tobytes())
                left -= count
        file.flush()
        os.fsync(file.fileno())
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / WEIGHTS


def child(source: Path, target: Path, threads: int, limit: int, mmap: int) -> dict[str, Any]:
    """Quantize in this process: seconds, and the most anonymous memory it had at a time."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    peak, ended = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, ended))
    watcher.start()
    before, started = _anonymous(), time.perf_counter()
    try:
        report = qkern.quantize_checkpoint(
            source, target, "nf4", threads=threads, mmap=bool(mmap), force=True
        )
    finally:
        ended.set()
        watcher.join()
    return {
        "seconds": report.seconds,
        "seconds_commit": report.seconds_commit,
        "seconds_call": time.perf_counter() - started,
        "anonymous_before": before,
        "anonymous_peak": peak[0],
        "nbytes_read": report.nbytes_read,
        "quantized": len([tensor for tensor in report.tensors if tensor.format is not None]),
    }


def _anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    msg = "/proc/self/status has no RssAnon: Linux 4.5 or newer is needed"
    raise OSError(msg)


def _watch(peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.005):
        peak[0] = max(peak[0], _anonymous())


def in_child(
    source: Path, target: Path, threads: int, *, limit: int = 0, mmap: bool = True
) -> dict[str, Any]:
    """``child`` in a process of its own; what was written is removed again."""
    command = [sys.executable, __file__, str(source), str(target)]
    command += ["--child", str(threads), str(limit), str(int(mmap))]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(run.stdout)
    result["nbytes_written"] = sum(file.stat().st_size for file in target.glob("*"))
    shutil.rmtree(target)
    return result


def warm_rows(
    file: Path, target: Path, threads: int, repeats: int, *, with_cp: bool
) -> Iterator[dict[str, Any]]:
    """All cases in turn, the file in the page cache."""
    checkpoint_limits.read_into_buffers(file, threads)
    size = file.stat().st_size
    mapped: list[dict[str, Any]] = []
    copied: list[dict[str, Any]] = []
    cases: dict[str, Callable[[], float]] = {
        "read, mapped": lambda: checkpoint_limits.read_mapped(file, threads),
        "read into buffers": lambda: checkpoint_limits.read_into_buffers(file, threads),
        "write what is written": lambda: checkpoint_limits.write(
            target, mapped[0]["nbytes_written"], threads
        ),
        "code values in L2": lambda: checkpoint_limits.quantize_in_l2(size // 2, threads),
    }
    if with_cp:
        cases["cp"] = lambda: checkpoint_limits.copy(file, target)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        mapped.append(in_child(file.parent, target, threads))
        copied.append(in_child(file.parent, target, threads, mmap=False))
        for name, run in cases.items():
            seconds[name].append(run())
    yield quantize_row("quantize, in page cache", size, mapped)
    yield quantize_row("quantize, in page cache, copied", size, copied)
    for name, times in seconds.items():
        yield {"case": name, "nbytes": size, **_summary(times)}
    limited = [in_child(file.parent, target, threads, limit=ADDRESS_SPACE) for _ in range(repeats)]
    row = quantize_row("quantize, address space limited", size, limited)
    yield row | {"address_space": ADDRESS_SPACE}


def cold_rows(file: Path, target: Path, threads: int) -> Iterator[dict[str, Any]]:
    """From the disk, beside reading alone."""
    size = file.stat().st_size
    checkpoint_limits.forget(file)
    yield quantize_row("quantize, cold", size, [in_child(file.parent, target, threads)])
    checkpoint_limits.forget(file)
    seconds = [checkpoint_limits.read_into_buffers(file, threads)]
    yield {"case": "read into buffers, cold", "nbytes": size, **_summary(seconds)}


def quantize_row(case: str, size: int, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several runs: medians, and of memory the most."""
    row = {"case": case, "nbytes": size, **_summary([run["seconds"] for run in runs])}
    for name in ("seconds_commit", "seconds_call"):
        row[name] = statistics.median(run[name] for run in runs)
    for name in ("anonymous_before", "anonymous_peak", "nbytes_written", "quantized"):
        row[name] = max(run[name] for run in runs)
    return row


def _summary(times: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(times),
        "minimum": min(times),
        "maximum": max(times),
        "repeats": len(times),
    }


def run(
    source: Path,
    target: Path,
    nbytes: int,
    *,
    threads: int,
    repeats: int,
    cold: bool,
    with_cp: bool = True,
) -> list[dict[str, Any]]:
    """All rows; the checkpoint is removed again."""
    file = make(source, shapes(nbytes) if nbytes else {"a.weight": (256, 512)})
    try:
        rows = list(warm_rows(file, target, threads, repeats, with_cp=with_cp))
        if cold:
            rows += cold_rows(file, target, threads)
    finally:
        shutil.rmtree(source)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(target)
    for row in rows:
        row["threads"] = threads
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a text."""
    mapped, buffers = (
        next(row["median"] for row in rows if row["case"] == case)
        for case in ("read, mapped", "read into buffers")
    )
    cells = []
    for row in rows:
        speed = row["nbytes"] / row["median"] / 1e9
        peak = row.get("anonymous_peak")
        cells.append(
            (
                row["case"],
                f"{row['nbytes'] / 1e9:.2f} GB",
                f"{row['median']:.3f} s",
                f"{speed:.2f} GB/s",
                f"{mapped / row['median']:.2f}",
                f"{buffers / row['median']:.2f}",
                "" if peak is None else f"{peak / 1e6:.0f} MB",
                f"{row['seconds_commit']:.3f} s" if "seconds_commit" in row else "",
            )
        )
    headers = ("case", "file", "time", "speed", "of read, mapped", "of read into buffers")
    headers += ("anonymous, peak", "fsync, rename")
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/checkpoint.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder that is made and removed: the input")
    parser.add_argument("target", type=Path, help="the same for the output: on a tmpfs")
    parser.add_argument("--gib", type=float, default=2.2, help="size of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="from the disk, too")
    parser.add_argument("--no-cp", action="store_true", help="there is no room for a copy")
    parser.add_argument("--save", metavar="NAME", help="write benches/results/NAME.json")
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.source, options.target, *options.child)))
        return
    for folder in (options.source, options.target):
        if folder.exists():
            parser.error(f"{folder} is there already: name folders that can be made and removed")
    rows = run(
        options.source,
        options.target,
        int(options.gib * GIB),
        threads=options.threads,
        repeats=options.repeats,
        cold=options.cold,
        with_cp=not options.no_cp,
    )
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save(options.save, rows)}")


if __name__ == "__main__":
    main()
