"""The CPU side beside other packages, the unquantized layer, and the limits of memory.

python benches/bench_cpu.py [--sections linear,codec] [--quick] [--no-peers] [--save]

One thread (the process is held on one core): its CPU time, medians. Two threads beside one: wall
time. Engines take turns; weights rotate through 300 MiB; each engine is checked against
fp64 before it is timed. Peers are ``requirements-peers.txt``; one that is missing is listed with
the reason. Needs a C compiler for the memory limits. Sections:

limits, codec    read, NT write, copy; quantize and dequantize, small shapes
linear           forward at M = 1 to 2048, exact fp32, a tall weight, small shapes
train            forward and backward with LoRA; LoRA on top
threads          two threads beside one, of codec, linear and train, small shapes
model            a Llama of a billion parameters: decoding, a training step
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

Row = dict[str, Any]
SECTIONS = ("limits", "codec", "linear", "train", "threads", "model")


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        quick: one tiny case of each, whose times mean nothing.
        peers: other packages too.
        cores: that this process may use.
    """

    quick: bool
    peers: bool
    cores: frozenset[int]

    @property
    def size(self) -> tuple[int, int]:
        """(out_features, in_features) of most cases."""
        return (256, 256) if self.quick else (4096, 4096)

    @property
    def ladder(self) -> list[int]:
        """Rows of x."""
        return [1, 4, 32] if self.quick else [1 << i for i in range(12)]

    @property
    def small(self) -> list[int]:
        """N of the weights (N, N) that stay in the caches."""
        return [64] if self.quick else [64, 128, 256, 512]


def limits_section(plan: Plan, effort: Any) -> Iterator[Row]:
    """One thread's limits, in buffers of the usual pages."""
    import cpu_threads
    import limits
    from cpu_timing import interleaved

    limits.check()
    for row in interleaved(cpu_threads.machine_limits(effort, 1), effort.sustained()):
        rate = {"GB/s": row["bytes"] / row["median"] / 1e9} if "bytes" in row else {}
        yield {"case": "limits", **rate, **row}


def codec_section(plan: Plan, effort: Any) -> Iterator[Row]:
    import cpu_codec

    sizes = [plan.size] if plan.quick else [plan.size, (14336, 4096)]
    return cpu_codec.run(sizes, plan.small, effort, peers=plan.peers)


def linear_section(plan: Plan, effort: Any) -> Iterator[Row]:
    import cpu_linear

    yield from cpu_linear.exact(plan.size, effort)
    yield from cpu_linear.ladder(plan.size, plan.ladder, effort, peers=plan.peers)
    if not plan.quick:
        yield from cpu_linear.large([(14336, 4096)], [1, 8, 32, 512], effort)
    yield from cpu_linear.in_l2([(256, plan.size[1]), (768, plan.size[1])], [1, 8, 32], effort)
    yield from cpu_linear.small([(n, n) for n in plan.small], [1, 32], effort)


def train_section(plan: Plan, effort: Any) -> Iterator[Row]:
    import cpu_train

    yield from cpu_train.train(plan.size, plan.ladder[-1] if plan.quick else 512, effort)
    yield from cpu_train.lora(plan.size, [1, 32 if plan.quick else 512], effort)


def threads_section(plan: Plan, effort: Any) -> Iterator[Row]:
    import cpu_threads

    return cpu_threads.run(plan.size, effort, set(plan.cores), quick=plan.quick)


def model_section(plan: Plan, effort: Any) -> Iterator[Row]:
    import cpu_model

    if plan.quick:
        return cpu_model.run(cpu_model.TINY, effort)
    return cpu_model.run(cpu_model.Shape(), dataclasses.replace(effort, repeats=5, budget=8.0))


RUN: dict[str, Callable[[Plan, Any], Iterator[Row]]] = {
    "limits": limits_section,
    "codec": codec_section,
    "linear": linear_section,
    "train": train_section,
    "threads": threads_section,
    "model": model_section,
}


def run(plan: Plan, sections: tuple[str, ...] = SECTIONS) -> list[Row]:
    """All rows; called without gradients."""
    import torch
    from cpu_timing import QUICK, Effort

    effort = QUICK if plan.quick else Effort()
    rows = []
    with torch.no_grad(), warnings.catch_warnings():
        if plan.peers:  # their own, among themselves
            warnings.simplefilter("ignore")
        for section in sections:
            start = time.perf_counter()
            for row in RUN[section](plan, effort):
                row["section"] = section
                rows.append(row)
            print(f"{section}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return rows


def one_core() -> frozenset[int]:
    """Hold this process and all its threads on one core, before torch counts them.

    Returns:
        The cores that it could use before.
    """
    folder = str(Path(sys.executable).parent)  # ninja, for a peer that compiles its kernels
    os.environ["PATH"] = os.pathsep.join((folder, os.environ.get("PATH", "")))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    if not hasattr(os, "sched_setaffinity"):
        return frozenset(range(os.cpu_count() or 1))
    cores = frozenset(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {max(cores)})
    return cores


def save(rows: list[Row]) -> None:
    """results/cpu_BODY.json, for the SIMD body of this machine, and the picture of the ladder."""
    import cpu_report
    import harness

    name = f"cpu_{harness.machine()['simd']}"
    path = harness.save(name, rows)
    content = json.loads(path.read_text())
    content["goals"] = cpu_report.goals(rows)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    if any(row.get("case") == "linear" and "M" in row and "absent" not in row for row in rows):
        print(f"wrote {cpu_report.plot(rows, path.with_suffix('.svg'))}")


def main() -> None:
    """Run, print, and with --save write results/cpu_BODY.json and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, with commas")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does everything run?")
    parser.add_argument("--no-peers", action="store_true", help="qkern, torch, bitsandbytes alone")
    parser.add_argument("--save", action="store_true", help="write benches/results/cpu_BODY.json")
    options = parser.parse_args()
    sections = tuple(options.sections.split(","))
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    if options.save and (options.quick or sections != SECTIONS):
        parser.error("what is saved is one run of all sections at full size")
    cores = one_core()
    import cpu_report
    import torch

    torch.set_num_threads(1)
    rows = run(Plan(options.quick, not options.no_peers, cores), sections)
    print(cpu_report.table(rows))
    if not options.quick:
        goals = cpu_report.goals(rows)
        if sections != SECTIONS:
            goals = [row for row in goals if row["measured"] is not None]
        if goals:
            print(f"\n{cpu_report.goals_table(goals)}")
    if options.save:
        save(rows)


if __name__ == "__main__":
    main()
