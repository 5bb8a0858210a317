"""The wheel: one small file with everything in it, that works where there is no torch."""

from __future__ import annotations

import email.parser
import os
import re
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "qkern"
SCRIPT = Path(__file__).with_name("without_torch.py")
LARGEST = 3_000_000  # bytes
EXTRAS = {"eval", "inspect", "lint", "peft", "test", "torch", "train"}


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command outside of this project's import paths."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    done = subprocess.run(
        command,
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key not in hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once from this tree."""
    pytest.importorskip("maturin", reason="maturin is not installed")
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "maturin", "build", "--release")
    run(*build, "--interpreter", sys.executable, "--out", out, cwd=ROOT)
    (built,) = out.iterdir()  # one file
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Paths of the files in the wheel."""
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    """The wheel's METADATA."""
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as opened:
        return email.parser.Parser().parsestr(opened.read(path).decode())


def cargo_version() -> str:
    """The one version of the project."""
    text = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    found = re.search(r'^\[workspace\.package\]\nversion = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found.group(1)


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    name, version, python, abi, _ = wheel.name.removesuffix(".whl").split("-")
    assert (name, version, python, abi) == ("qkern", cargo_version(), "cp310", "abi3")
    assert wheel.stat().st_size < LARGEST


def test_every_file_of_the_package_is_in_the_wheel_and_no_other(names: set[str]) -> None:
    patterns = ("*.py", "*.pyi", "*.json", "py.typed")
    files = {file for pattern in patterns for file in PACKAGE.rglob(pattern)}
    expected = {f"qkern/{file.relative_to(PACKAGE).as_posix()}" for file in files}
    assert {"qkern/py.typed", "qkern/_native.pyi", "qkern/kernels/__init__.py"} <= expected
    packed = {name for name in names if ".dist-info/" not in name}
    native = {name for name in packed if re.fullmatch(r"qkern/_native.*\.(so|pyd)", name)}
    assert len(native) == 1
    assert packed - native == expected


def test_metadata(metadata: Message) -> None:
    assert metadata["Version"] == cargo_version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.split(r"[<>=~ ]", line)[0] for line in required] == ["numpy"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_works_where_there_is_no_torch(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", wheel, cwd=tmp_path)
    installed = run(*pip, "list", "--format=freeze", cwd=tmp_path)
    assert "torch" not in installed
    assert run(python, SCRIPT, cwd=tmp_path).startswith("works: float32 float16 uint16 with qkern")
    assert "usage: qkern" in run(python, "-m", "qkern", "--help", cwd=tmp_path)
