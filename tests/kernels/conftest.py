"""On a GPU, tests here make their tensors on it, and never lend its memory to host code."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_device import (
    DEVICE,
    INTERPRETED,
    host_code_takes_cpu_tensors_alone,
    patch_once_a_launch,
)

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    patch_once_a_launch()

# They send CPU tensors to the kernels by force: the operators of a GPU are tested in tests/gpu.
FORCED = (
    "test_dropout_operator",
    "test_lora_operator",
    "test_merged_operator",
    "test_operators",
    "test_torch_device",
)


# None of these launches a kernel in this process.
NOT_INTERPRETED = ("test_aot", "test_dispatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on a GPU what is about the interpreter, and what an old interpreter cannot do."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if INTERPRETED:
            _of_the_interpreter(item)
            continue
        reasons = [mark.args[0] for mark in item.iter_markers("interpreter")]
        if item.path.stem in FORCED:
            reasons.append("sends CPU tensors to the interpreter by force")
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


def _of_the_interpreter(item: pytest.Item) -> None:
    """Of Triton before 3.8: it makes scalars of arrays in a way that NumPy 2.4 took away."""
    if not _is_old() or item.path.stem in NOT_INTERPRETED:
        return
    if tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
        reason = "the interpreter of Triton before 3.8 needs NumPy before 2.4"
        item.add_marker(pytest.mark.skip(reason=reason))
    deprecated = "ignore:Conversion of an array with ndim:DeprecationWarning"
    item.add_marker(pytest.mark.filterwarnings(deprecated))


@functools.cache
def _is_old() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from qkern.kernels.rounding import VERSION

    return VERSION < (3, 8)


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    """Tensors are made on the device under test."""
    if INTERPRETED:
        yield
        return
    with host_code_takes_cpu_tensors_alone(), torch.device(DEVICE):
        yield
