"""On a GPU, tests here make their tensors on it, and never lend its memory to host code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, host_code_takes_cpu_tensors_alone

# They send CPU tensors to the kernels by force: the operators of a GPU are tested in tests/gpu.
FORCED = (
    "test_device_ops",
    "test_dropout_operator",
    "test_lora_operator",
    "test_merged_operator",
    "test_operators",
    "test_torch_device",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on a GPU what is about the interpreter."""
    if INTERPRETED:
        return
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        reasons = [mark.args[0] for mark in item.iter_markers("interpreter")]
        if item.path.stem in FORCED:
            reasons.append("sends CPU tensors to the interpreter by force")
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """Tensors are made on the device under test."""
    if INTERPRETED:
        yield
        return
    with host_code_takes_cpu_tensors_alone(), torch.device(DEVICE):
        yield
