"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / "python"
MODULES = sorted(
    ".".join(file.relative_to(PYTHON).with_suffix("").parts)
    for file in PYTHON.rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
