"""Checkpoints that are written: where they may be, and two writers at once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write
from dense_checkpoints import write_model
from file_trees import tree
from writing_processes import answers, interrupt, start

import qkern
from qkern.checkpoint.staging import FOLDER

# -- where it may be written -----------------------------------------------------------------


@pytest.mark.case("C11")
def test_places_that_are_no_folder_of_their_own_leave_everything_as_it_was(
    tmp_path: Path, src: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    before = tree(src), (tmp_path / "file").read_text()
    for place in (src, src / "sub", src / ".." / src.name, *tmp_path.iterdir()):
        if place.name == "elsewhere":
            continue
        for force in (False, True):
            with pytest.raises(qkern.OutputError, match=r"source|symbolic link|is no folder"):
                qkern.quantize_checkpoint(src, place, force=force)
    assert (tree(src), (tmp_path / "file").read_text()) == before
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.case("C11")
def test_an_older_checkpoint_is_replaced_by_force_alone(
    older: Path, src: Path, expected: dict[str, str]
) -> None:
    before = tree(older)
    with pytest.raises(qkern.OutputError, match=r"would be replaced.*force"):
        qkern.quantize_checkpoint(src, older)
    assert tree(older) == before
    target = older / "config.json"
    target.rename(older / "real.json")
    target.symlink_to(older / "real.json")
    qkern.quantize_checkpoint(src, older, force=True)
    assert (older / "notes.txt").read_text() == "mine"
    assert not target.is_symlink()  # the link was replaced, not what it led to
    assert tree(older).items() >= expected.items()


@pytest.mark.case("C11")
@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "pytorch_model-00001-of-00002.bin", "x.index.json"]
)
def test_files_of_another_model_are_not_mixed_with_new_ones(
    tmp_path: Path, src: Path, expected: dict[str, str], name: str
) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / name).write_text("a stranger's")
    (dst / "notes.txt").write_text("mine")
    before = tree(dst)
    for dry_run in (True, False):
        with pytest.raises(qkern.OutputError, match=rf"{name} of another model.*force"):
            qkern.quantize_checkpoint(src, dst, dry_run=dry_run)
    with pytest.raises(qkern.OutputError, match="of another model"):
        qkern.convert_checkpoint(src, dst, "float16")
    assert tree(dst) == before
    qkern.quantize_checkpoint(src, dst, force=True)
    assert tree(dst) == before | expected


@pytest.mark.case("C11")
def test_a_folder_with_another_models_config_gets_no_weights_without_one(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {"a.weight": torch.randn(64, 64)})
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "config.json").write_text("{}")
    with pytest.raises(qkern.OutputError, match=r"config\.json of another model"):
        qkern.quantize_checkpoint(src, dst)
    # Of a single file the name was given: what lies beside it is the caller's.
    qkern.quantize_checkpoint(src / "model.safetensors", dst)
    assert set(tree(dst)) == {"config.json", "model.safetensors"}


@pytest.mark.case("C13")
def test_what_came_into_the_folder_meanwhile_does_not_cost_an_unfinished_run(
    tmp_path: Path, src: Path, expected: dict[str, str]
) -> None:
    dst = tmp_path / "dst"
    interrupt(src, dst)
    (dst / "other.safetensors").write_text("a stranger's")
    with pytest.raises(qkern.OutputError, match=r"other\.safetensors of another model"):
        qkern.quantize_checkpoint(src, dst)
    (dst / "other.safetensors").unlink()
    assert qkern.quantize_checkpoint(src, dst).resumed
    assert tree(dst) == expected


@pytest.mark.case("C11")
def test_shards_of_an_older_checkpoint_do_not_stay(tmp_path: Path, src: Path) -> None:
    dst = tmp_path / "dst"
    qkern.quantize_checkpoint(src, dst)
    one = write_model(tmp_path / "one", {"a.weight": torch.randn(64, 64)})
    qkern.quantize_checkpoint(one, dst, force=True)
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert set(tree(dst)) == names
    qkern.quantize_checkpoint(src, dst, force=True)
    assert "model.safetensors" not in tree(dst)


@pytest.mark.case("C15")
@pytest.mark.parametrize("name", ["a space", "\N{GREEK SMALL LETTER ALPHA}\N{SNOWMAN}", "a'\"$b"])
def test_names_of_any_letters_are_written(
    tmp_path: Path, src: Path, expected: dict[str, str], name: str
) -> None:
    shutil.copytree(src, tmp_path / f"src {name}")
    qkern.quantize_checkpoint(tmp_path / f"src {name}", tmp_path / name)
    assert tree(tmp_path / name) == expected


@pytest.mark.case("C15")
def test_places_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / ("x" * 300), tmp_path / ("x/" * 4000)):
        with pytest.raises(qkern.OutputError, match="File name too long"):
            qkern.quantize_checkpoint(src, place)
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere
        mkdir = os.mkdir

        def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
            if "locked" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            mkdir(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", refuse)
    read: list[int] = []
    with pytest.raises(qkern.OutputError, match=r"locked.*Permission denied"):
        qkern.quantize_checkpoint(
            src, tmp_path / "locked", progress=lambda done, _: read.append(done)
        )
    assert read == []
    assert not list((tmp_path / "locked").iterdir())


# -- two writers -----------------------------------------------------------------------------


@pytest.mark.case("C16")
def test_a_second_writer_is_refused_and_the_first_ends_well(
    tmp_path: Path, src: Path, expected: dict[str, str]
) -> None:
    dst = tmp_path / "dst"

    def second(done: int, total: int) -> None:
        if not refused:
            refused.extend(answers({"src": src, "dst": dst, "settings": {"force": True}}))

    refused: list[dict[str, Any]] = []
    qkern.quantize_checkpoint(src, dst, progress=second)
    assert refused[0]["error"] == "LockedError"
    assert f"process {os.getpid()}" in refused[0]["message"]
    assert tree(dst) == expected


@pytest.mark.case("C16")
def test_the_lock_of_a_killed_writer_does_not_hang(
    tmp_path: Path, src: Path, expected: dict[str, str]
) -> None:
    dst, task = tmp_path / "dst", {"src": src, "count": True}
    events = answers({**task, "dst": tmp_path / "counted"})[0]["events"]
    process = start({"src": src, "dst": dst, "kill_at": events // 2})
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (dst / FOLDER / "lock").read_text() == f"{process.pid}\n"
    qkern.quantize_checkpoint(src, dst)
    assert tree(dst) == expected
