"""Side-by-side timing: engines interleaved in one process; medians and spread as JSON.

Absolute times on shared machines mean little; ratios within one run are what is reported.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "bitsandbytes", "torchao", "hqq", "numpy", "transformers")
PACKAGES += ("optimum-quanto", "ggml-python")


def interleaved(
    engines: Mapping[str, Callable[[], object]], *, repeats: int, min_time: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Seconds of each engine: median, quartiles, minimum.

    Args:
        engines: what to call, by name; each is called once to warm up.
        repeats: rounds; every engine runs once in each, in turn.
        min_time: seconds that one measurement lasts at least, by calling a fast engine often.
    """
    loops = {}
    for name, run in engines.items():
        run()
        start = time.perf_counter()
        run()
        loops[name] = max(1, int(min_time / max(time.perf_counter() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, run in engines.items():
            start = time.perf_counter()
            for _ in range(loops[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / loops[name])
    return {name: _summary(times) for name, times in seconds.items()}


def _summary(times: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "median": statistics.median(times),
        "quartiles": [quartiles[0], quartiles[2]],
        "minimum": min(times),
        "repeats": len(times),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from qkern import _native

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "simd": _native.simd(),
        "python": platform.python_version(),
        "packages": {"qkern": _native.__version__} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows and the machine as ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"bench": name, "machine": machine(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout; where there is none, or no git, what QKERN_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty"]
    where = RESULTS.parent
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
    except OSError:
        return os.environ.get("QKERN_COMMIT")
    return run.stdout.strip() or os.environ.get("QKERN_COMMIT")
