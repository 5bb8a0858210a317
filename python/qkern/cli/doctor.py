"""``qkern doctor``: what is installed, what this machine has, and which path will run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from qkern.cli import exit_codes
from qkern.integrations import bitsandbytes
from qkern.text_table import format_table

HELP = "show versions, hardware, and which path each operation takes here"
EXAMPLE = "qkern doctor --json"

_PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
)
# Present where a kernel driver serves a GPU; importing torch to ask takes seconds.
_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128", "/dev/dxg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the tables; exit code 3 if the native extension does not load."""
    report = gather()
    if args.json:
        text = json.dumps(report)
    else:
        machine = [(name, _plain(value)) for name, value in report["machine"].items()]
        plugin = report["bitsandbytes plug-in"]
        state = f"{'on' if plugin['on'] else 'off'}: {plugin['why']}"
        rows = [*report["versions"].items(), ("", ""), *machine]
        rows += [("bitsandbytes plug-in", state)]
        rows = [(name, "not installed" if value is None else value) for name, value in rows]
        paths = [(p["operation"], p["device"], p["path"], p["why"]) for p in report["paths"]]
        if plugin["on"]:
            why = "instead of bitsandbytes' own"
            paths += [(name, "cpu", "qkern", why) for name in plugin["operators"]]
        text = f"{format_table(rows)}\n\n{format_table(paths, ('operation', 'on', 'runs', 'why'))}"
    sys.stdout.write(text + "\n")
    return exit_codes.DONE if report["native"] else exit_codes.NO


def gather() -> dict[str, Any]:
    """Everything the command shows, as JSON values."""
    native, problem = _native()
    versions = {"qkern": native.__version__ if native else f"native extension missing: {problem}"}
    versions |= {"python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    gpu = _gpu()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": _cores(),
        "cpu features": [name for name, on in native.cpu_features().items() if on]
        if native
        else [],
        "simd": native.simd() if native else None,
        "simd bodies": native.available_simd() if native else [],
        "QKERN_SIMD": os.environ.get("QKERN_SIMD"),
        "gpu": gpu["name"] or gpu["why"],
    }
    paths = [*_cpu_paths(native, problem), *_gpu_paths(gpu, native, problem)]
    return {
        "native": native is not None,
        "versions": versions,
        "machine": machine,
        "paths": paths,
        "bitsandbytes plug-in": _plugin(problem),
    }


def cpu_model() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "hardware", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _native() -> tuple[Any, str]:
    try:
        return importlib.import_module("qkern._native"), ""
    except ImportError as error:
        return None, str(error)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu() -> dict[str, Any]:
    """The name of the GPU that torch sees, or why there is none."""
    nothing = {"name": None}
    if importlib.util.find_spec("torch") is None:
        return nothing | {"why": "none: torch is not installed"}
    linux = sys.platform == "linux"
    if linux and not any(Path(node).exists() for node in _GPU_NODES):
        return nothing | {"why": "none: no GPU driver on this machine"}
    try:
        import torch
    except (ImportError, OSError) as error:
        return nothing | {"why": f"unknown: torch does not import: {error}"}
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip or "a CPU-only build"
        return nothing | {"why": f"none: torch ({build}) sees no GPU"}
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, capability {major}.{minor}"
    return {"name": name, "why": ""}


def _cpu_paths(native: Any, problem: str) -> list[dict[str, str]]:
    if native is None:
        return [_path(name, "cpu", "nothing", problem) for name in ("quantize", "dequantize")]
    forced = os.environ.get("QKERN_SIMD")
    why = f"forced by QKERN_SIMD={forced}" if forced else "the fastest body that this CPU runs"
    body = f"Rust, {native.simd()}"
    paths = [_path(name, "cpu", body, why) for name in ("quantize", "dequantize")]
    if importlib.util.find_spec("torch") is None:
        return [
            *paths,
            _path("linear", "cpu", "nothing", 'needs torch: pip install "qkern[torch]"'),
        ]
    return [*paths, _path("linear", "cpu", body, why)]


def _gpu_paths(gpu: dict[str, Any], native: Any, problem: str) -> list[dict[str, str]]:
    why = gpu["why"] or ("" if native else problem)
    if why:
        return [_path(name, "gpu", "nothing", why) for name in ("quantize", "dequantize", "linear")]
    import torch

    from qkern.ops.dequantize import why_no_kernel

    gap = why_no_kernel(torch.device("cuda"))
    how, served = "torch operations" if gap else "Triton", "triton serves this GPU"
    return [
        *(_path(name, "gpu", how, gap or served) for name in ("quantize", "dequantize")),
        _path("linear", "gpu", *_gpu_linear(gap)),
    ]


def _gpu_linear(gap: str) -> tuple[str, str]:
    if gap:
        return "torch operations", "the weight is dense during the call"
    return "Triton", "many tokens multiply a weight that is dense during the call, with torch"


def _plugin(problem: str) -> dict[str, Any]:
    """Whether programs that import bitsandbytes compute by qkern on a CPU, and why."""
    status = bitsandbytes.status()
    is_on = status.is_on and not problem
    return {
        "on": is_on,
        "why": problem or status.why,
        "operators": [f"bitsandbytes::{name}" for name in status.operators],
    }


def _path(operation: str, device: str, path: str, why: str) -> dict[str, str]:
    return {"operation": operation, "device": device, "path": path, "why": why}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "not set" if value is None else value
