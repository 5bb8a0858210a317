"""The dense checkpoint that the tests of written ones share, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checkpoints import write_sharded
from file_trees import tree

import qkern


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_sharded(tmp_path_factory.mktemp("dense") / "src")


@pytest.fixture(scope="module")
def expected(src: Path) -> dict[str, str]:
    """Hashes of the files that a run writes that nothing disturbs."""
    qkern.quantize_checkpoint(src, src.parent / "expected")
    return tree(src.parent / "expected")


@pytest.fixture
def older(tmp_path: Path, src: Path) -> Path:
    """A directory that holds an older checkpoint of other settings, and a file of its own."""
    directory = tmp_path / "dst"
    qkern.quantize_checkpoint(src, directory, "int8")
    (directory / "notes.txt").write_text("mine")
    return directory
