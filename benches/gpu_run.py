"""Cells one after the other inside a budget of time; results on disk after each.

The cells run in a process of their own. If it dies, hangs or loses its device, the cell is noted
and a new process goes on with the rest. What does not fit into the budget is noted too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_device
import gpu_plan
import torch
from gpu_plan import Cell, Plan, Run

BENCH = Path(__file__).with_name("bench_gpu.py")
LOST = 75  # exit status of a process whose device failed
# Seconds: what is left of the budget when the last cell ends, and of a cell before it is given up.
RESERVE = 8
PATIENCE = 60
COMPILE_AT_MOST = 100


class Results:
    """What is known so far, and the file that holds it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "bench": "gpu",
            "rows": [],
            "done": {},
            "failed": {},
            "dropped": {},
            "running": None,
            "earlier": [],
        }

    @classmethod
    def load(cls, path: Path) -> Results:
        """Those that an earlier process wrote."""
        found = cls(path)
        if path.exists():
            found.content = json.loads(path.read_text(encoding="utf-8"))
        return found

    def resume(self, path: Path) -> str:
        """Take over the cells that another run has done.

        Args:
            path: of its results.

        Returns:
            Why nothing was taken, empty if it was: other code, or another machine.
        """
        earlier = Results.load(path).content
        for key in ("quick", "machine"):
            mine, theirs = (_comparable(each.get(key)) for each in (self.content, earlier))
            if mine != theirs:
                return f"another {key}: {theirs}"
        done = self.content["done"] = earlier["done"]
        self.content["rows"] = [row for row in earlier["rows"] if row.get("cell") in done]
        about = {key: earlier.get(key) for key in ("before", "after", "seconds", "compiled")}
        self.content["earlier"] = [*earlier.get("earlier", []), about]
        return ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of all cells."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def save(self) -> None:
        """Write the file whole, or leave the old one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def is_settled(self, cell: Cell) -> bool:
        """Whether a cell ran already, or is not to run any more."""
        return any(cell.key in self.content[kind] for kind in ("done", "failed", "dropped"))

    def begin(self, cell: Cell) -> None:
        """Note what runs, so that its end can be missed."""
        self.content["running"] = {"cell": cell.key, "since": time.time(), "seconds": cell.seconds}
        self.save()

    def end(self, cell: Cell, rows: Iterable[dict[str, Any]], failure: str | None = None) -> None:
        """Note what came of it."""
        started = self.content["running"]["since"]
        self.content["rows"] += [{"stage": cell.stage, "cell": cell.key, **row} for row in rows]
        if failure is None:
            self.content["done"][cell.key] = round(time.time() - started, 2)
        else:
            self.content["failed"][cell.key] = failure
        self.content["running"] = None
        self.save()


def _comparable(about: Any) -> Any:
    """A machine without its commit: ``code`` says what is run."""
    return about | {"commit": None} if isinstance(about, dict) else about


def work(plan: Plan, stages: Iterable[str], results: Results, deadline: float) -> bool:
    """Run the cells that are not settled, the most important first.

    Args:
        plan: sizes.
        stages: of ``gpu_plan.STAGES``.
        results: read and written.
        deadline: of ``time.time``.

    Returns:
        False if the device cannot be used any more by this process.
    """
    run = Run(plan, results.rows)
    with torch.no_grad(), gpu_device.through_kernels(plan.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages', among themselves
        for cell in gpu_plan.in_order(gpu_plan.cells(run, stages)):
            if results.is_settled(cell):
                continue
            left = deadline - time.time() - RESERVE
            if cell.importance > 0 and cell.seconds > left:
                results.content["dropped"][cell.key] = (
                    f"needs {cell.seconds:.0f} s, {left:.0f} left"
                )
                continue
            if not _run_cell(cell, results, plan):
                return False
    results.save()
    return True


def _run_cell(cell: Cell, results: Results, plan: Plan) -> bool:
    """One cell; False if the device is lost."""
    results.begin(cell)
    rows: list[dict[str, Any]] = []
    try:
        for row in cell.run():
            rows.append(row)  # noqa: PERF402 - those before a failure are kept
    except Exception as error:
        text = "".join(traceback.format_exception(error, limit=-4))[-2000:]
        results.end(cell, rows, text)
        print(f"{cell.key}: FAILED: {error}", file=sys.stderr, flush=True)
    else:
        results.end(cell, rows)
        print(f"{cell.key}: {results.content['done'][cell.key]} s", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        gpu_device.release(plan.device)
    return not gpu_device.is_lost(plan.device)


def compile_share(plan: Plan, stages: Iterable[str], index: int, count: int) -> None:
    """Compile every ``count``-th of the kernels that will be timed, into Triton's cache."""
    with torch.no_grad(), gpu_device.through_kernels(plan.device):
        for call in gpu_plan.compilations(Run(plan, []), stages)[index::count]:
            try:
                call()
            except Exception as error:
                if gpu_device.is_lost(plan.device):
                    raise
                print(f"compiling: {error}", file=sys.stderr)  # its cell says so too
            gpu_device.release(plan.device)


def compile_in_parallel(arguments: list[str], workers: int) -> float:
    """All kernels by several processes at once; what is not ready then is compiled when called.

    Args:
        arguments: of the bench, for each process.
        workers: processes.

    Returns:
        Seconds.
    """
    start = time.time()
    command = [sys.executable, str(BENCH), *arguments]
    running = [
        subprocess.Popen([*command, "--compile", f"{i}/{workers}"], stdout=subprocess.DEVNULL)
        for i in range(workers)
    ]
    while any(process.poll() is None for process in running):
        if time.time() - start > COMPILE_AT_MOST:
            for process in running:
                process.kill()
        time.sleep(0.2)
    return time.time() - start


def supervise(arguments: list[str], path: Path, deadline: float) -> None:
    """Run the cells in processes until all are settled, or the time is over.

    Args:
        arguments: of the bench, for each process.
        path: of the results.
        deadline: of ``time.time``.
    """
    while True:
        command = [sys.executable, str(BENCH), *arguments, "--worker", str(deadline)]
        process = subprocess.Popen(command, env=os.environ)
        reason = _watched(process, path, deadline)
        results = Results.load(path)
        running = results.content["running"]
        if running is not None:
            results.content["failed"][running["cell"]] = reason
            results.content["running"] = None
            results.save()
        elif process.returncode != LOST:
            if process.returncode != 0:
                results.content["failed"]["the bench"] = reason
                results.save()
            return
        if deadline - time.time() < RESERVE + 20:
            return


def _watched(process: subprocess.Popen[bytes], path: Path, deadline: float) -> str:
    """Wait for the end; end it where a cell or all takes too long. Why it ended."""
    while True:
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            running = Results.load(path).content["running"]
            now = time.time()
            if now > deadline + RESERVE:
                reason = "the time was over"
            elif running and now - running["since"] > PATIENCE + 4 * running["seconds"]:
                reason = f"took longer than {now - running['since']:.0f} s"
            else:
                continue
            process.kill()
            process.wait()
            return reason
        return f"the process ended with status {process.returncode}"
