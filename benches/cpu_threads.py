"""Two threads beside one, for bench_cpu.py: the same calls on the same buffers, in turn.

All in one process, in which the number of threads is switched before each measurement. It is a
process of its own, since bench_cpu.py is held on one core: this one has two from its start, when
every package's own pool of threads gets its size. Wall time: ratios of medians, and beside them of
minima, where a process that waits for a core has no say. A minimum shows what a core does at its
best, which two may not do for long: tiles are several times slower when they have worked a while.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from cpu_timing import Effort, Engine, Seconds, absent, interleaved

Row = dict[str, Any]
TILED = 1024  # tokens and rows of the product whose tile instructions are a limit
TALL, SMALL = (14336, 4096), ((64, 64), (128, 128), (256, 256), (512, 512))


def machine_limits(effort: Effort, threads: int) -> list[Engine]:
    """Reading, filling and copying buffers that leave the caches, in GB/s; the tile instructions.

    Args:
        effort: see there.
        threads: that the buffers are cut for; torch's number of them is used.
    """
    import limits
    import torch

    nbytes = max(1 << 20, effort.rotate // 2)
    source, to = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    pool = ThreadPoolExecutor(threads)
    halves = list(zip(source.chunk(threads), to.chunk(threads), strict=True))
    parts = {
        "limit: read": [limits.reader(*half) for half in halves],
        "limit: NT write": [limits.writer(b) for _, b in halves],
        "limit: copy": [limits.copier(b, a) for a, b in halves],
    }

    def run(calls: list[Callable[[], object]]) -> None:
        if torch.get_num_threads() == 1:  # on this thread, whose CPU time may be measured
            for call in calls:
                call()
            return
        for done in [pool.submit(call) for call in calls]:
            done.result()

    def moved(name: str) -> int:
        return 2 * nbytes if "read" in name else nbytes

    found = [Engine(n, [partial(run, calls)], {"bytes": moved(n)}) for n, calls in parts.items()]
    if limits.has_tiles():
        share = limits.multiplier(TILED, TILED, effort.rotate >> 16)
        found.append(Engine("limit: tiles", [partial(run, [share] * threads)]))
    return found


def codec_engines(effort: Effort, *, size: tuple[int, int]) -> list[Engine]:
    """Quantize and dequantize."""
    import torch
    from cpu_codec import SHORT, copies, each
    from cpu_timing import random_weight

    import qkern

    shape, engines = f"{size[0]}x{size[1]}", []
    for dtype in (torch.float32, torch.bfloat16):
        w = random_weight(*size).to(dtype)
        inputs, about = copies(w, effort), f"{SHORT[dtype]}, {shape}"
        sources = [qkern.quantize(w) for _ in range(effort.copies(w.numel() // 2))]
        reused = [
            partial(qkern.dequantize, q, out=inputs[i % len(inputs)]) for i, q in enumerate(sources)
        ]
        int8, search = {"quant_type": "int8"}, {"method": "search"}
        engines += [
            Engine(f"quantize {about}", each(qkern.quantize, inputs)),
            Engine(f"quantize int8 {about}", each(partial(qkern.quantize, **int8), inputs)),
            Engine(f"quantize, search, {about}", each(partial(qkern.quantize, **search), inputs)),
            Engine(f"dequantize {about}, fresh output", each(qkern.dequantize, sources)),
            Engine(f"dequantize {about}, reused output", reused),
        ]
    return engines


def linear_engines(effort: Effort, *, size: tuple[int, int], Ms: tuple[int, ...]) -> list[Engine]:
    """qkern's linear layers and torch's."""
    import cpu_engines
    import torch
    from cpu_timing import random_weight

    w = random_weight(*size)
    builders = cpu_engines.OWN | {
        "qkern fp32": partial(cpu_engines.with_qkern, dtype=torch.float32)
    }
    layers, _ = cpu_engines.build(builders, w, effort)
    engines, inputs = [], cpu_engines.Inputs(w, max(Ms))
    for M in Ms:
        for layer in layers:
            exact = layer.dtype == torch.float32
            if exact and M > 1:
                continue
            engine = layer.engine(inputs, M)
            engine.name = f"{'qkern fp32' if exact else layer.name}, {size[0]}x{size[1]}, M={M}"
            engines.append(engine)
    return engines


def train_engines(effort: Effort, *, size: tuple[int, int], M: int) -> list[Engine]:
    """Forward and backward with LoRA."""
    import cpu_train
    import torch
    from cpu_timing import random_weight

    w = random_weight(*size)
    x = torch.randn(M, size[1]).bfloat16().requires_grad_()
    grad = torch.randn(M, size[0]).bfloat16()
    engines = []
    for name in ("qkern", "qkern, int8 compute", "torch bf16"):
        layer = cpu_train.MAKERS[name](w)
        cpu_train.fill_adapter(layer)
        made = cpu_train.clones(layer, w, effort)
        calls = [partial(cpu_train.step, one, x, grad) for one in made]
        engines.append(Engine(f"{name}, forward and backward with LoRA, M={M}", calls))
    return engines


def lora_engines(effort: Effort, *, size: tuple[int, int], Ms: tuple[int, ...]) -> list[Engine]:
    """The forward with LoRA."""
    import cpu_train
    from cpu_timing import random_weight

    w = random_weight(*size)
    layer = cpu_train.with_qkern(w)
    cpu_train.fill_adapter(layer)
    made = cpu_train.clones(layer, w, effort)
    xs = {M: cpu_train.tokens(M, size[1]) for M in Ms}
    return [
        Engine(f"qkern with LoRA, M={M}", [partial(one, x) for one in made]) for M, x in xs.items()
    ]


Builder = Callable[[Effort], list[Engine]]


def cases(size: tuple[int, int], *, quick: bool) -> dict[str, Builder]:
    """What builds the engines of each group; the groups are measured one after the other."""
    Ms = (1, 32) if quick else (1, 8, 32, 512)
    found: dict[str, Builder] = {
        "limits": partial(machine_limits, threads=2),
        "codec": partial(codec_engines, size=size),
        "linear": partial(linear_engines, size=size, Ms=Ms),
        "lora": partial(lora_engines, size=size, Ms=(Ms[0], Ms[-1])),
    }
    if quick:
        return found
    found["codec, tall"] = partial(codec_engines, size=TALL)
    found["train"] = partial(train_engines, size=size, M=Ms[-1])
    for s in SMALL:
        found[f"codec, small, {s[0]}"] = partial(codec_engines, size=s)
        found[f"linear, small, {s[0]}"] = partial(linear_engines, size=s, Ms=(1, 32))
    return found


TILED_GROUPS = ("limits", "linear", "lora", "train")


@dataclass
class Switched(Engine):
    """An engine with a number of threads."""

    threads: int = 1

    def measure(self, loops: int, start: int = 0) -> Seconds:
        import torch

        torch.set_num_threads(self.threads)
        return super().measure(loops, start)


def measured(builder: Builder, effort: Effort) -> list[Row]:
    """Rows of each engine of a group with one thread and with two; called in the other process."""
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    engines = [
        Switched(f"{engine.name} ({threads})", engine.calls, engine.facts, threads=threads)
        for engine in builder(effort)
        for threads in (1, 2)
    ]
    return interleaved(engines, effort, wall=True)


@contextlib.contextmanager
def _surroundings(threads: int, cores: set[int]) -> Iterator[None]:
    """What a new process inherits: libraries look at it as soon as they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    mine = os.sched_getaffinity(0) if cores else set()
    os.environ.update(dict.fromkeys(names, str(threads)))
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)
        if cores:
            os.sched_setaffinity(0, mine)


def run(
    size: tuple[int, int], effort: Effort, cores: set[int], *, quick: bool = False
) -> Iterator[Row]:
    """Each case with one thread and with two."""
    available = sorted(cores)
    if len(available) < 2 and not quick:
        yield absent("two threads", "this process may use one core only", case="threads")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as other:
        with _surroundings(2, set(available[:2]) if len(available) > 1 else set()):
            other.submit(os.getpid).result()  # the process begins with the first task
        for group, builder in cases(size, quick=quick).items():
            how = effort.sustained() if group in TILED_GROUPS else effort
            yield from paired(other.submit(measured, builder, how).result(), group)


def paired(rows: list[Row], group: str) -> Iterator[Row]:
    """The rows, with how many times faster two threads are than one."""
    one: Mapping[str, Row] = {row["engine"]: row for row in rows}
    for row in rows:
        name, threads = row["engine"][:-4], int(row["engine"][-2])
        if "bytes" in row:
            row["GB/s"] = row["bytes"] / row["minimum"] / 1e9
        alone, key = one[f"{name} (1)"], "times faster than one thread"
        ratios = {key: alone["median"] / row["median"]}
        ratios[f"{key}, minima"] = alone["minimum"] / row["minimum"]
        fields = {"case": "threads", "group": group, "threads": threads, "engine": name}
        yield {**row, **fields, **ratios}
