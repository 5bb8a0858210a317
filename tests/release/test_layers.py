"""Who may import whom: the contracts of pyproject.toml hold, and nobody goes around them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "qkern"
# The version and `qkern doctor` ask the extension itself; all work goes through the codec.
NATIVE_IMPORTERS = {
    *("__init__.py", "codec.py", "cli/doctor.py", "patterns.py"),
    *("checkpoint/source.py", "checkpoint/stream.py"),
}


def test_import_contracts_hold(tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    run = subprocess.run(
        [
            *(sys.executable, "-c", "from importlinter.cli import *; lint_imports_command()"),
            *("--config", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path)),
        ],
        cwd=PACKAGE.parent,  # so that this tree is read, not an installed package
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_native_extension_has_few_importers() -> None:
    # Linters see `import` statements only; this sees names given to importlib too.
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if "qkern._native" in names_in(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found <= NATIVE_IMPORTERS
    assert "codec.py" in found


def names_in(tree: ast.Module) -> set[str]:
    """Full names of what a file imports, and its texts."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names
