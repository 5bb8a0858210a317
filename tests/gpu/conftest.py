"""Tests that need a GPU: elsewhere they are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_device import INTERPRETED, host_code_takes_cpu_tensors_alone


class NeedsGPU(pytest.Module):
    """A file whose tests are not even read."""

    def collect(self) -> list[pytest.Item]:
        """Nothing."""
        pytest.skip("needs a GPU: make test-gpu", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip all files here, in one line, unless QKERN_TEST_DEVICE names a GPU."""
    if INTERPRETED:
        return NeedsGPU.from_parent(parent, path=module_path)  # type: ignore[no-any-return]
    return None


@pytest.fixture(autouse=True)
def _codec_stays_on_the_host() -> Iterator[None]:
    with host_code_takes_cpu_tensors_alone():
        yield
