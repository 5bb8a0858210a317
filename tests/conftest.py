"""Shared fixtures: seeds, hypothesis profiles, small real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

try:
    import torch
except ImportError:  # the tests of the NumPy door run without torch
    torch = None  # type: ignore[assignment]

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis: few examples here, more with HYPOTHESIS_PROFILE=thorough."""
    import hypothesis

    hypothesis.settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True)
    hypothesis.settings.register_profile("thorough", max_examples=300, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
    if torch is not None:
        # The models here are tiny: a second thread costs more than it gives, and much more
        # on a machine that is busy with something else.
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of small real models and texts beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no small real model beside the checkout ({SHARED.name}/)")
    return SHARED
