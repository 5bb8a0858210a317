"""The device that bench_gpu.py runs on, and its clock: a GPU, or a CPU that shows that it runs.

On a CPU qkern's operators are sent to the kernels, in Triton's interpreter. Its times mean nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import pkgutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from torch import Tensor

PACKAGES = ("triton", "peft")
ROOT = Path(__file__).parents[1]
# What nvidia-smi is asked for, before and after.
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu")


@contextlib.contextmanager
def through_kernels(device: torch.device) -> Iterator[None]:
    """On a CPU: operators do what they do on a GPU, but for scales in 8 bits: too slow there."""
    if device.type != "cpu":
        yield
        return
    from torch.library import CustomOpDef

    from qkern import kernels, ops

    operators: dict[str, Any] = {}
    for found in pkgutil.iter_modules(ops.__path__, "qkern.ops."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, CustomOpDef) and "cpu" in value._backend_fns:
                operators[value._qualname] = value
    operators.pop("qkern::quantize_absmax", None)
    with contextlib.ExitStack() as stack:
        for operator in operators.values():
            stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        stack.enter_context(mock.patch.object(kernels, "is_supported", return_value=True))
        stack.enter_context(torch.device("cpu"))  # a mode: nothing goes around the operators
        yield


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """How long the device takes for what ``run`` enqueues: events around it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def captured(calls: Callable[[], None]) -> Callable[[], None]:
    """What replays a CUDA graph of ``calls``; they ran before, so that all is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def allocated(device: torch.device) -> int:
    """Bytes of tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device, run: Callable[[], object]) -> int:
    """Most bytes of tensors while ``run`` runs; 0 where nobody counts them."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def release(device: torch.device) -> None:
    """Give back what is cached: the next cell starts from an empty device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    """Gaussian fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def is_lost(device: torch.device) -> bool:
    """Whether this process cannot use the device any more.

    After an access out of bounds nothing works, after a failed capture no random numbers do.
    """
    if device.type != "cuda":
        return False
    try:
        torch.rand(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def code() -> str:
    """A digest of the package's Python files and of this bench: what figures are of."""
    files = [*ROOT.glob("python/qkern/**/*.py"), *ROOT.glob("python/qkern/kernels/configs/*.json")]
    digest = hashlib.sha256()
    for file in sorted([*files, *ROOT.glob("benches/*gpu*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    found = harness.machine()
    found["packages"] |= {name: harness._version(name) for name in PACKAGES}
    found["code"] = code()
    found["device"] = {"type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": getattr(properties, "L2_cache_size", None),
            "CUDA": torch.version.cuda or torch.version.hip,
            "devices": torch.cuda.device_count(),
        }
    return found


def state(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and load, if nvidia-smi tells."""
    if device.type != "cuda":
        return {}
    query = ",".join(("driver_version", *STATE))
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}: {error}"[:200]}
    values = run.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(("driver", *STATE), values, strict=False))
