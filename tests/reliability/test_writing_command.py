"""``qkern quantize`` on odd terminals and pipes, and in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_trees import tree
from writing_processes import PATHS, answers

# -- memory ----------------------------------------------------------------------------------


def sparse_model(path: Path, tensors: int, shape: tuple[int, int]) -> Path:
    """A file of bf16 zeros that takes no room."""
    size = 2 * shape[0] * shape[1]
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    path.mkdir()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * size)
    return path


@pytest.mark.case("E13")
@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_memory_is_a_part_of_a_file(tmp_path: Path, quant_type: str) -> None:
    """192 MiB of weights, in no more address space than 96 MiB beyond what Python had."""
    src = sparse_model(tmp_path / "src", 24, (1024, 4096))
    settings = {"quant_type": quant_type, "threads": 1}
    task = {"src": src, "dst": tmp_path / "dst", "settings": settings}
    assert answers({**task, "memory": 96 << 20})[0]["error"] is None
    packed = 24 * 1024 * 4096 // (2 if quant_type == "nf4" else 1)
    assert (tmp_path / "dst" / "model.safetensors").stat().st_size > packed


# -- the command -----------------------------------------------------------------------------


def command(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "qkern", "quantize", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PATHS, **options.pop("env", {})},
        **options,
    )


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of so many columns."""
    fcntl, pty = pytest.importorskip("fcntl"), pytest.importorskip("pty")
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


@pytest.mark.case("E15")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_closed_pipe_is_no_traceback(
    tmp_path: Path, src: Path, expected: dict[str, str], arguments: list[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with command(
        src, tmp_path / "dst", *arguments, stdout=writing, stderr=subprocess.PIPE
    ) as process:
        os.close(writing)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (5, b"")
    assert tree(tmp_path / "dst") == expected


@pytest.mark.case("E15")
@pytest.mark.parametrize(("columns", "env"), [(12, {}), (80, {"NO_COLOR": "1"}), (0, {})])
def test_progress_fits_the_terminal_and_has_no_colour(
    tmp_path: Path, src: Path, columns: int, env: dict[str, str]
) -> None:
    with terminal(columns) as (ours, theirs):
        with command(
            src, tmp_path / "dst", stdout=subprocess.PIPE, stderr=theirs, env=env
        ) as process:
            os.close(theirs)
            out, _ = process.communicate(timeout=60)
        err = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 65536):
                err += chunk
    assert process.returncode == 0
    assert b"quantizing" in err
    assert b"\x1b" not in out
    assert not re.search(rb"\x1b\[[0-9;]*m", err)
    assert b"Traceback" not in err
    if columns:
        assert all(len(line) <= columns for line in re.split(r"[\r\n]|\x1b\[A", err.decode()))


@pytest.mark.case("E15")
def test_without_a_terminal_nothing_is_said_on_the_way(tmp_path: Path, src: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with command(src, tmp_path / "dst", "--json", **pipes) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["path"] == str(tmp_path / "dst")
