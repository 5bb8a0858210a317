"""Commands that write checkpoints, killed: files are old or new, and the next run goes on."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import write_sharded
from file_trees import tree
from peft_adapters import model, write_adapter, write_base
from writing_processes import answers, start

import qkern
from qkern.checkpoint.staging import FOLDER

KILLS = int(os.environ.get("QKERN_TEST_KILLS", "8"))


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What each command is asked to do, but for the place."""
    torch.manual_seed(0)
    dense = write_sharded(tmp_path / "dense")
    qkern.quantize_checkpoint(dense, tmp_path / "quantized")
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", model())
    again = {"force": True, "threads": 2}
    tasks: dict[str, dict[str, Any]] = {
        "quantize": {"src": dense, "settings": again},
        "convert": {"src": tmp_path / "quantized", "settings": again | {"to": "float16"}},
        "merge": {"src": tmp_path / "base", "adapter": tmp_path / "adapter", "settings": again},
    }
    return {name: {"command": name, **task} for name, task in tasks.items()}


@pytest.mark.case("C13")
@pytest.mark.parametrize("command", ["quantize", "convert", "merge"])
def test_killed_at_any_moment_files_are_old_or_new_and_the_next_run_goes_on(
    tmp_path: Path, tasks: dict[str, dict[str, Any]], command: str
) -> None:
    """``kill -9`` by turns at a file operation and at a time, over and over."""
    task = {**tasks[command], "dst": tmp_path / "dst"}
    answers({**task, "dst": tmp_path / "expected"})
    expected = tree(tmp_path / "expected")
    # An older checkpoint of other settings, and a file of its own.
    dense = tasks["merge" if command == "merge" else "quantize"]["src"]
    qkern.quantize_checkpoint(dense, tmp_path / "older", "int8")
    (tmp_path / "older" / "notes.txt").write_text("mine")
    old = tree(tmp_path / "older")
    shutil.copytree(tmp_path / "older", tmp_path / "dst")
    chance = random.Random(0)
    started = time.perf_counter()
    events = answers({**task, "dst": tmp_path / "counted", "count": True})[0]["events"]
    seconds = time.perf_counter() - started
    resumed = 0
    for i in range(KILLS):
        _kill(task, chance, events if i % 2 else 0, seconds)
        final = {n: sha for n, sha in tree(tmp_path / "dst").items() if not n.startswith(FOLDER)}
        assert all(sha in (old.get(name), expected.get(name)) for name, sha in final.items())
        assert final.keys() >= old.keys() & expected.keys()
        resumed += (tmp_path / "dst" / FOLDER / "journal.jsonl").exists()
        if final.items() >= expected.items():  # begin once more, from the older files
            shutil.rmtree(tmp_path / "dst")
            shutil.copytree(tmp_path / "older", tmp_path / "dst")
    assert resumed, "no run was killed with something to go on with"
    assert answers(task)[0]["error"] is None
    assert tree(tmp_path / "dst") == expected | {"notes.txt": old["notes.txt"]}


def _kill(task: dict[str, Any], chance: random.Random, events: int, seconds: float) -> None:
    """End a run at one of its file operations, or (0) some time after its start."""
    process = start({**task, "kill_at": chance.randint(1, events)} if events else task)
    if not events:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, seconds))
        process.kill()
    process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL)
