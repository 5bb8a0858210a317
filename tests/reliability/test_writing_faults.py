"""Checkpoints that are written: what a fault leaves, and how a run goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from file_trees import tree
from writing_processes import answers, interrupt

import qkern
from qkern.checkpoint.staging import FOLDER

# -- faults ----------------------------------------------------------------------------------


@pytest.mark.case("C12")
def test_a_full_disk_at_any_byte_leaves_the_older_files_and_nothing_else(
    older: Path, src: Path, expected: dict[str, str]
) -> None:
    """A limit on the size of files, from 0 to one that all files keep."""
    before = tree(older)
    largest = max((src.parent / "expected" / name).stat().st_size for name in expected)
    limits = [0, 1, 100, *range(1000, largest, largest // 12), largest - 1]
    task = {"src": src, "dst": older, "settings": {"force": True}}
    fresh = older.parent / "fresh"
    tasks = [{**task, "dst": dst, "file_size": n} for n in limits for dst in (older, fresh)]
    for asked, result in zip(tasks, answers(*tasks), strict=True):
        assert result["error"] == "OutOfSpaceError", (asked, result)
        assert "File too large" in result["message"]
        assert result["left"] == (before if asked["dst"] == older else None), asked
    assert answers({**task, "file_size": 2 * largest})[0]["error"] is None
    assert tree(older).items() >= expected.items()


@pytest.mark.case("C12")
def test_room_is_looked_for_before_the_start(
    tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10_000}))
    for dry_run in (True, False):
        with pytest.raises(qkern.OutOfSpaceError, match=r"MiB are needed, .* are free"):
            qkern.quantize_checkpoint(src, tmp_path / "dst", dry_run=dry_run)
    assert not (tmp_path / "dst").exists()


@pytest.mark.case("C13")
def test_a_resumed_run_reads_no_finished_tensor_again(
    tmp_path: Path, src: Path, expected: dict[str, str]
) -> None:
    interrupt(src, tmp_path / "dst")
    told: list[int] = []
    report = qkern.quantize_checkpoint(
        src, tmp_path / "dst", progress=lambda done, total: told.append(total)
    )
    assert report.resumed == 3
    assert report.nbytes_read < told[0]
    assert tree(tmp_path / "dst") == expected
    whole = qkern.quantize_checkpoint(src, tmp_path / "other")
    assert report.tensors == whole.tensors  # with the errors that the first run measured


@pytest.mark.case("C13", "C17")
@pytest.mark.parametrize("damage", ["codes", "scales", "truncated", "gone", "torn journal"])
def test_what_a_dead_run_left_is_not_trusted(
    tmp_path: Path, src: Path, expected: dict[str, str], damage: str
) -> None:
    dst = tmp_path / "dst"
    interrupt(src, dst, after=8)
    shard = dst / FOLDER / "files" / "model-0.safetensors"
    spill = dst / FOLDER / "model-0.safetensors.scales"
    journal = dst / FOLDER / "journal.jsonl"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 3)
    elif damage == "gone":
        shard.unlink()
    elif damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-7])
    else:
        path = shard if damage == "codes" else spill
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    report = qkern.quantize_checkpoint(src, dst)
    assert report.resumed < 8
    assert tree(dst) == expected


@pytest.mark.case("C17")
def test_leftovers_without_a_journal_are_ignored(
    tmp_path: Path, src: Path, expected: dict[str, str]
) -> None:
    staged = tmp_path / "dst" / FOLDER
    (staged / "files").mkdir(parents=True)
    for name in ("lock", "files/model-0.safetensors", "files/x", "old.scales", "journal.jsonl"):
        (staged / name).write_bytes(b"\xff" * 1000)
    (tmp_path / "dst" / ".config.json.abc.tmp").write_text("not ours to remove")
    qkern.quantize_checkpoint(src, tmp_path / "dst")
    found = tree(tmp_path / "dst")
    assert found.pop(".config.json.abc.tmp")
    assert found == expected


@pytest.mark.case("C17")
@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/../../b", "", 7])
def test_a_commit_of_others_moves_nothing_out_of_the_folder(
    tmp_path: Path, src: Path, name: object
) -> None:
    staged = tmp_path / "dst" / FOLDER
    staged.mkdir(parents=True)
    for key in ("names", "stale"):
        content = {"names": [], "stale": [], "head": {}, "done": {}} | {key: [name]}
        (staged / "commit.json").write_text(json.dumps(content))
        with pytest.raises(qkern.CorruptFileError, match=f"{key} is no list of files"):
            qkern.quantize_checkpoint(src, tmp_path / "dst")


@pytest.mark.case("C14")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocksize": 128}, r"settings: blocksize: 64 then, 128 now"),
        ({"quant_type": "fp4"}, r'settings: quant_type: "nf4" then, "fp4" now'),
        ({"exclude": ["odd"]}, r'settings: exclude: \[\] then, \["odd"\] now'),
        ({"method": "search"}, r'settings: method: "absmax" then, "search" now'),
    ],
)
def test_other_settings_do_not_go_on(
    tmp_path: Path, src: Path, settings: dict[str, Any], words: str
) -> None:
    dst = tmp_path / "dst"
    interrupt(src, dst)
    before = tree(dst)
    with pytest.raises(qkern.OutputError, match=f"(?s){words}.*force"):
        qkern.quantize_checkpoint(src, dst, **settings)
    assert tree(dst) == before
    qkern.quantize_checkpoint(src, dst, **settings, force=True)
    qkern.quantize_checkpoint(src, tmp_path / "other", **settings)
    assert tree(dst) == tree(tmp_path / "other")


@pytest.mark.case("C14")
@pytest.mark.parametrize("change", ["weights", "config", "time", "version"])
def test_other_inputs_do_not_go_on(tmp_path: Path, src: Path, change: str) -> None:
    mine, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(src, mine)
    interrupt(mine, dst)
    file = mine / "model-1.safetensors"
    words = rf"inputs: {file.name}: mtime_ns: \d+ then, \d+ now"
    if change == "weights":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif change == "time":
        os.utime(file, ns=(0, 0))
    elif change == "config":
        path = mine / "config.json"
        path.write_text(path.read_text().replace("96", "97"))
        words = r'inputs: config.json: .*sha256: "\w+" then, "\w+" now'
    else:
        journal = dst / FOLDER / "journal.jsonl"
        version = json.dumps(qkern.__version__)
        journal.write_text(journal.read_text().replace(version, '"0.0.1"', 1))
        words = rf'qkern: "0\.0\.1" then, {re.escape(version)} now'
    with pytest.raises(qkern.OutputError, match=f"(?s){words}"):
        qkern.quantize_checkpoint(mine, dst)
    qkern.quantize_checkpoint(mine, dst, force=True)


@pytest.mark.case("C14", "C18")
def test_an_input_that_changes_meanwhile_is_refused(tmp_path: Path, src: Path) -> None:
    shutil.copytree(src, tmp_path / "src")

    def touch(done: int, total: int) -> None:
        os.utime(tmp_path / "src" / "model-0.safetensors", ns=(0, 0))

    with pytest.raises(qkern.CorruptFileError, match=r"model-0\.safetensors was written to"):
        qkern.quantize_checkpoint(tmp_path / "src", tmp_path / "dst", progress=touch)
    assert not (tmp_path / "dst").exists()


# -- durability ------------------------------------------------------------------------------


@pytest.mark.case("C19")
@pytest.mark.parametrize("failing", range(4))
def test_a_failing_fsync_is_reported_and_nothing_is_renamed(
    older: Path, src: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, count, fsync = tree(older), 0, os.fsync

    def fail(handle: int) -> None:
        nonlocal count
        count += 1
        if count > failing:
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(qkern.OutputError, match="Input/output error"):
        qkern.quantize_checkpoint(src, older, force=True)
    assert tree(older) == before


@pytest.mark.case("C19")
def test_a_rename_that_fails_is_done_by_the_next_run(
    older: Path, src: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, count = Path.replace, 0

    def fail(self: Path, target: Path) -> Path:
        nonlocal count
        count += self.parent.name == "files"
        if count == 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(qkern.OutputError, match="cannot be written"):
            qkern.quantize_checkpoint(src, older, force=True)
    report = qkern.quantize_checkpoint(src, older)  # no force: it only ends what was begun
    assert report.relative_rms is not None
    assert tree(older).items() >= expected.items()
    assert not (older / FOLDER).exists()
