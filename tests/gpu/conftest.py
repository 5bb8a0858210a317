"""Tests that need a GPU: elsewhere they are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_device import INTERPRETED, host_code_takes_cpu_tensors_alone


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    """Skip, unless QKERN_TEST_DEVICE names one; then host code takes the CPU's tensors alone."""
    if INTERPRETED:
        pytest.skip("needs a GPU: make test-gpu")
    with host_code_takes_cpu_tensors_alone():
        yield
