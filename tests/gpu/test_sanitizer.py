"""compute-sanitizer over small launches: no races in shared memory, no access out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sanitized.py")
TOOL = shutil.which("compute-sanitizer")


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, sys.executable, WORKER],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | more,
    )


def test_the_launches_are_right_without_a_sanitizer() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_no_errors_are_found(tool: str) -> None:
    assert TOOL is not None
    assert run().returncode == 0  # compiles: the sanitized run finds the code
    # Each tensor its own allocation, so that what lies behind it belongs to nobody.
    done = run(TOOL, "--tool", tool, "--error-exitcode", "9", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, text[-6000:]
