"""Two threads beside one, for bench_cpu.py: two processes that measure the same cases in turn.

One process is held on one core, the other has both, so that every package's own pool of threads
has its size from the start. Wall time, minimum: a process that waits for a core has no say in it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from cpu_timing import Effort, Engine, Seconds, absent, interleaved

Row = dict[str, Any]
LARGE, SMALL = (4096, 4096), ((64, 64), (128, 128), (256, 256), (512, 512))


def memory_limits(effort: Effort, threads: int) -> list[Engine]:
    """Reading, filling and copying two halves of buffers that leave the caches, in GB/s."""
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
        if threads == 1:  # on this thread, whose CPU time is measured
            calls[0]()
            return
        for done in [pool.submit(call) for call in calls]:
            done.result()

    def moved(name: str) -> int:
        return 2 * nbytes if "read" in name else nbytes

    return [Engine(n, [partial(run, calls)], {"bytes": moved(n)}) for n, calls in parts.items()]


def codec_engines(effort: Effort, threads: int, *, size: tuple[int, int]) -> list[Engine]:
    """Quantize and dequantize."""
    import torch
    from cpu_codec import SHORT, copies, each
    from cpu_timing import random_weight

    import qkern

    engines = []
    for dtype in (torch.float32, torch.bfloat16):
        w = random_weight(*size).to(dtype)
        inputs, short = copies(w, effort), SHORT[dtype]
        sources = [qkern.quantize(w) for _ in range(effort.copies(w.numel() // 2))]
        reused = [
            partial(qkern.dequantize, q, out=inputs[i % len(inputs)]) for i, q in enumerate(sources)
        ]
        engines += [
            Engine(f"quantize {short}", each(qkern.quantize, inputs)),
            Engine(
                f"quantize int8 {short}", each(partial(qkern.quantize, quant_type="int8"), inputs)
            ),
            Engine(f"dequantize {short}, fresh output", each(qkern.dequantize, sources)),
            Engine(f"dequantize {short}, reused output", reused),
        ]
    return engines


def linear_engines(
    effort: Effort, threads: int, *, size: tuple[int, int], Ms: tuple[int, ...]
) -> list[Engine]:
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


def train_engines(effort: Effort, threads: int, *, size: tuple[int, int], M: int) -> list[Engine]:
    """Forward and backward with LoRA."""
    import cpu_train
    import torch
    from cpu_timing import random_weight

    w = random_weight(*size)
    x = torch.randn(M, size[1]).bfloat16().requires_grad_()
    grad = torch.randn(M, size[0]).bfloat16()
    engines = []
    for name in ("qkern", "torch bf16"):
        layer = cpu_train.MAKERS[name](w)
        cpu_train.fill_adapter(layer)
        made = cpu_train.clones(layer, w, effort)
        calls = [partial(cpu_train.step, one, x, grad) for one in made]
        engines.append(Engine(f"{name}, forward and backward with LoRA, M={M}", calls))
    return engines


Builder = Callable[[Effort, int], list[Engine]]


def cases(size: tuple[int, int], *, quick: bool) -> dict[str, Builder]:
    """What builds the engines of each group; the groups are measured one after the other."""
    Ms = (1, 32) if quick else (1, 8, 32, 512)
    found: dict[str, Builder] = {
        "limits": memory_limits,
        "codec": partial(codec_engines, size=size),
        "linear": partial(linear_engines, size=size, Ms=Ms),
    }
    if quick:
        return found
    found["train"] = partial(train_engines, size=size, M=Ms[-1])
    for s in SMALL:
        found[f"linear, small, {s[0]}"] = partial(linear_engines, size=s, Ms=(1, 32))
    return found


def serve(pipe: Connection, threads: int) -> None:
    """The other end of ``Worker``."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    engines: list[Engine] = []
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if verb == "build":
                builder, effort = arguments
                engines = []  # the last group's weights are freed first
                engines = builder(effort, threads)
                pipe.send([(engine.name, dict(engine.facts)) for engine in engines])
            else:
                index, loops, start = arguments
                pipe.send(engines[index].measure(loops, start))
        except Exception as error:
            pipe.send(error)


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


class Worker:
    """A process with a fixed number of threads."""

    def __init__(self, threads: int, cores: set[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.threads = threads
        self.pipe, theirs = context.Pipe()
        with _surroundings(threads, cores):
            self.process = context.Process(target=serve, args=(theirs, threads), daemon=True)
            self.process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """What ``serve`` answers; its error is raised here."""
        self.pipe.send(message)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join()


@dataclass
class Remote(Engine):
    """An engine in a worker."""

    worker: Worker | None = None
    index: int = 0

    def measure(self, loops: int, start: int = 0) -> Seconds:
        assert self.worker is not None
        found: Seconds = self.worker.ask("measure", self.index, loops, start)
        return found


def run(
    size: tuple[int, int], effort: Effort, cores: set[int], *, quick: bool = False
) -> Iterator[Row]:
    """Each case with one thread and with two."""
    available = sorted(cores)
    if len(available) < 2 and not quick:
        yield absent("two threads", "this process may use one core only", case="threads")
        return
    pinned = {available[0]} if len(available) > 1 else set()
    workers = [Worker(1, pinned), Worker(2, set(available[:2]) if len(available) > 1 else set())]
    try:
        for group, builder in cases(size, quick=quick).items():
            engines: list[Engine] = []
            built = [worker.ask("build", builder, effort) for worker in workers]
            for index, (name, facts) in enumerate(built[0]):
                for worker in workers:
                    full = f"{name} ({worker.threads})"
                    engines.append(Remote(full, (), facts, worker=worker, index=index))
            rows = interleaved(engines, effort, wall=True)
            yield from paired(rows, group)
    finally:
        for worker in workers:
            worker.close()


def paired(rows: list[Row], group: str) -> Iterator[Row]:
    """The rows, with how many times faster two threads are than one."""
    one: Mapping[str, Row] = {row["engine"]: row for row in rows}
    for row in rows:
        name, threads = row["engine"][:-4], int(row["engine"][-2])
        if "bytes" in row:
            row["GB/s"] = row["bytes"] / row["minimum"] / 1e9
        ratio = one[f"{name} (1)"]["minimum"] / row["minimum"]
        fields = {"case": "threads", "group": group, "threads": threads}
        yield {**row, **fields, "engine": name, "times faster than one thread": ratio}
