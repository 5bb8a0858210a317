"""Processes that quantize checkpoints (see writing_worker.py), and what became of their calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qkern
from qkern.checkpoint.journal import Journal
from qkern.checkpoint.staging import FOLDER
from qkern.checkpoint.stream import Done

WORKER = Path(__file__).with_name("writing_worker.py")
# Where a process finds qkern and the modules beside this one.
PATHS = os.pathsep.join([str(WORKER.parent), str(Path(qkern.__file__).parents[1])])


def start(*tasks: dict[str, Any]) -> subprocess.Popen[str]:
    """A process that does the tasks, past its imports."""
    texts = [json.dumps(task, default=str) for task in tasks]
    process = subprocess.Popen(
        [sys.executable, str(WORKER), *texts],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def answers(*tasks: dict[str, Any]) -> list[dict[str, Any]]:
    with start(*tasks) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


class _Stop(Exception):  # noqa: N818 - no error of a run
    pass


def interrupt(src: Path, dst: Path, *, after: int = 3, **settings: Any) -> None:
    """A run that ends in the middle, as by Ctrl-C: so many tensors are done."""
    add = Journal.add

    def stop(self: Journal, name: str, done: Done) -> None:
        if len(self.done) == after:
            raise _Stop
        add(self, name, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        with pytest.raises(_Stop):
            qkern.quantize_checkpoint(src, dst, **settings)
    lines = (dst / FOLDER / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 1 + after
