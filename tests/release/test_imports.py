"""What `import qkern` costs and brings along, and that NumPy alone is enough for arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qkern

SCRIPT = Path(__file__).with_name("without_torch.py")
# Starts of the interpreter before a time counts as slow: the best of them is the honest one.
ATTEMPTS = 12


def python(*arguments: str) -> str:
    """Output of a fresh interpreter that finds the same qkern as this one."""
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(qkern.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def measure(before: str, timed: str) -> dict[str, Any]:
    """Seconds of ``timed`` after ``before``, and the packages that it imported."""
    code = (
        f"import json, sys, time\n{before}\nold = set(sys.modules)\n"
        f"start = time.perf_counter()\n{timed}\nseconds = time.perf_counter() - start\n"
        "new = sorted({name.partition('.')[0] for name in set(sys.modules) - old})\n"
        "print(json.dumps({'seconds': seconds, 'packages': new}))"
    )
    return json.loads(python("-c", code))


def best_seconds(before: str, timed: str, limit: float) -> float:
    """The least of several times; stops at the first that is within ``limit``."""
    best = float("inf")
    for _ in range(ATTEMPTS):
        best = min(best, measure(before, timed)["seconds"])
        if best < limit:
            break
    return best


def test_import_brings_neither_numpy_nor_torch() -> None:
    packages = measure("", "import qkern")["packages"]
    assert "qkern" in packages
    assert not {"numpy", "torch", "triton", "transformers", "peft"} & set(packages)


def test_quantizing_arrays_does_not_import_torch() -> None:
    packages = measure(
        "import numpy", "import qkern\nqkern.dequantize(qkern.quantize(numpy.ones(64, 'f')))"
    )["packages"]
    assert not {"torch", "triton", "transformers", "peft"} & set(packages)


def test_the_torch_part_does_not_import_other_packages() -> None:
    packages = measure("import torch", "import qkern\nqkern.quantize_model")["packages"]
    assert not {"triton", "transformers", "peft", "bitsandbytes", "trl"} & set(packages)


def test_import_takes_milliseconds() -> None:
    assert best_seconds("", "import qkern", 0.050) < 0.050


def test_the_torch_part_adds_little_to_torch() -> None:
    timed = "import qkern\nqkern.quantize_model, qkern.QuantizedTensor, qkern.save"
    # Each operator takes some milliseconds to register, and a busy machine takes twice as long.
    assert best_seconds("import torch", timed, 0.400) < 0.400


def test_numpy_door_where_torch_cannot_be_imported() -> None:
    pytest.importorskip("ml_dtypes")
    output = python(str(SCRIPT), "torch", "triton", "transformers", "peft")
    assert output.startswith("works: float32 float16 uint16 bfloat16 with qkern")
