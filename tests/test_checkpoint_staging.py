"""Staging, journal, lock and destination: what is written, resumed, refused, and left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qkern.checkpoint import lock as locks
from qkern.checkpoint.destination import check_existing, check_place, check_space, stale_files
from qkern.checkpoint.journal import Journal, differences, done_as_json, done_from_json
from qkern.checkpoint.lock import WriterLock
from qkern.checkpoint.staging import FOLDER, Staging, writing
from qkern.checkpoint.stream import Done, Errors
from qkern.errors import LockedError, OutOfSpaceError, OutputError

DONE = Done(3, True, 0.061538390815258026, 17, 4294967295, Errors(5, 1.5, 0.25, 0.125))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def tree(path: Path) -> dict[str, bytes]:
    found = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


# -- lock ------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    first, second = WriterLock(tmp_path / "a" / "lock"), WriterLock(tmp_path / "a" / "lock")
    first.acquire()
    with pytest.raises(LockedError, match=f"written by process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_lock_file_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(f"{dead_pid()}\n")
    lock = WriterLock(path)
    lock.acquire()
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_one(tmp_path: Path) -> None:
    """Between the opening of the file and its lock its owner may end, and remove it."""
    path = tmp_path / "folder" / "lock"
    lock, calls = WriterLock(path), []

    def lock_late(handle: int) -> bool:
        if not calls:
            path.unlink()
            path.parent.rmdir()
        calls.append(handle)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "_try_lock", lock_late)
        lock.acquire()
    assert len(calls) == 2
    assert path.exists()
    lock.release()


def test_without_locks_of_the_file_system_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks, "_try_lock", refuse)
    path = tmp_path / "lock"
    path.write_text(f"{os.getppid()}\n")
    with pytest.raises(LockedError, match=f"process {os.getppid()}"):
        WriterLock(path).acquire()
    path.write_text(f"{dead_pid()}\n")
    lock = WriterLock(path)
    lock.acquire()
    lock.release()


# -- journal ---------------------------------------------------------------------------------


def test_what_is_done_comes_back(tmp_path: Path) -> None:
    assert done_from_json(json.loads(json.dumps(done_as_json(DONE)))) == DONE._replace(job=-1)
    with Journal(tmp_path / "j") as journal:
        assert (journal.head, journal.done) == (None, {})
        journal.begin({"settings": 1})
        journal.add("a", DONE)
        journal.add("b", DONE._replace(errors=None))
        journal.add("a", DONE._replace(crc=18))
    again = Journal(tmp_path / "j")
    assert again.head == {"settings": 1}
    assert again.done["a"].crc == 18
    assert again.done["b"].errors is None


@pytest.mark.parametrize("torn", [b'{"tensor": "b", "cr', b"\0\0\0\n", b'{"tensor": "b"}\n', b"7"])
def test_a_torn_line_is_ignored_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.begin({"settings": 1})
        journal.add("a", DONE)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Journal(path) as journal:
        assert set(journal.done) == {"a"}
        journal.add("c", DONE)
    assert path.read_bytes().startswith(whole)
    assert set(Journal(path).done) == {"a", "c"}


def test_a_torn_first_line_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"settings": ')
    with Journal(path) as journal:
        assert journal.head is None
        journal.begin({"settings": 2})
    assert Journal(path).head == {"settings": 2}


def test_differences_are_named_with_both_values() -> None:
    then = {"qkern": "0.1", "settings": {"blocksize": 64, "method": "absmax"}, "inputs": {"a": 1}}
    now = {"qkern": "0.1", "settings": {"blocksize": 128, "method": "absmax"}, "inputs": {"b": 2}}
    assert differences(then, then) == []
    assert differences(then, now) == [
        "settings: blocksize: 64 then, 128 now",
        "inputs: a: 1 then, nothing now",
        "inputs: b: nothing then, 2 now",
    ]


# -- staging ---------------------------------------------------------------------------------


def stage(staging: Staging, **files: bytes) -> list[str]:
    for name, content in files.items():
        (staging.files / name).write_bytes(content)
    return list(files)


def interrupt(directory: Path, head: dict[str, Any] | None = None) -> None:
    """A run that ends in an error, with a file staged."""

    def run() -> None:
        with Staging(directory) as staging:
            if head is not None:
                staging.journal.begin(head)
                staging.journal.add("a", DONE)
            stage(staging, a=b"a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


def test_files_appear_at_the_commit_and_nothing_else_is_left(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "dst"
    with Staging(directory) as staging:
        staging.journal.begin({})
        (staging.files / "sub").mkdir()
        (staging.files / "sub" / "c").write_bytes(b"c")
        staging.spill("a").write_bytes(b"spilled")
        names = stage(staging, a=b"a", b=b"b")
        assert set(tree(directory)) == {
            f"{FOLDER}/{name}"
            for name in ("lock", "journal.jsonl", "a.scales", "files/a", "files/b", "files/sub/c")
        }
        staging.commit([*names, "sub/c"], [], {})
    assert tree(directory) == {"a": b"a", "b": b"b", "sub/c": b"c"}
    assert not (directory / FOLDER).exists()


def test_without_a_journal_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        interrupt(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_with_a_journal_everything_is_kept_for_the_next_run(tmp_path: Path) -> None:
    interrupt(tmp_path, {"x": 1})
    with Staging(tmp_path) as staging:
        assert staging.journal.head == {"x": 1}
        assert set(staging.journal.done) == {"a"}
        assert tree(staging.files) == {"a": b"a"}
        staging.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("renamed", range(5))
def test_a_commit_that_was_cut_off_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """After each rename, and before the first."""
    stage_files = {name: name.encode() * 3 for name in ("a", "b", "c", "config.json")}
    for name in (*stage_files, "old"):
        (tmp_path / name).write_bytes(b"old")
    replace, count = Path.replace, 0

    def replace_some(self: Path, target: Path) -> Path:
        nonlocal count
        if self.parent.name == "files":
            if count == renamed:
                raise KeyboardInterrupt
            count += 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_some)

    def run() -> None:
        with Staging(tmp_path) as staging:
            staging.journal.begin({})
            staging.commit(stage(staging, **stage_files), ["old"], {"told": 7})

    if renamed == 4:
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
        found = {name: (tmp_path / name).read_bytes() for name in stage_files}
        assert list(found.values()).count(b"old") == 4 - renamed
        monkeypatch.undo()
        with Staging(tmp_path) as staging:
            pending = staging.pending_commit()
            assert pending is not None
            assert pending["told"] == 7
            staging.roll_forward(pending)
            staging.clear()
    assert tree(tmp_path) == stage_files


def test_what_cannot_be_made_durable_is_not_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def run() -> None:
        with Staging(tmp_path) as staging:
            names = stage(staging, a=b"a")
            monkeypatch.setattr(os, "fsync", fail)
            staging.commit(names, [], {})

    with pytest.raises(OutputError, match="Input/output error"):
        run()
    assert not list(tmp_path.iterdir())


def test_a_staging_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("link", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / FOLDER).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file" / FOLDER).write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(OutputError, match="is no folder"), Staging(tmp_path / name):
            pass
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "file" / FOLDER).read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_has_its_own_error(code: int) -> None:
    with pytest.raises(OutOfSpaceError, match=r"a/b: .*free some room"), writing(Path("a")):
        raise OSError(code, os.strerror(code), "a/b")


# -- destination -----------------------------------------------------------------------------


def test_places_that_are_no_folder_of_their_own_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "in").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    places = {
        source: "is the source",
        source / "in": "lies in the source",
        source / "new" / "x": "lies in the source",
        tmp_path / "src" / ".." / "src": "is the source",
        tmp_path / "link": "symbolic link",
        tmp_path / "loop": "symbolic link",
        tmp_path / "dangling": "symbolic link",
        tmp_path / "file": "is no folder",
        tmp_path / "fifo": "is no folder",
        tmp_path / "file" / "x": "cannot be written|is no folder",
        tmp_path / ("x" * 300): "name too long",
    }

    def begin(place: Path) -> None:
        check_place(source, place)
        Staging(place).__enter__()

    for place, words in places.items():
        with pytest.raises(OutputError, match=f"(?i){words}"):
            begin(place)
    with pytest.raises(OutputError, match="is the source"):
        check_place(source / "model.safetensors", source)
    check_place(source, tmp_path / "new" / "deep")
    check_place(source, tmp_path / "a space, \N{GREEK SMALL LETTER ALPHA}")


def test_files_in_the_way_are_named(tmp_path: Path) -> None:
    names = ["model-1.safetensors", "config.json"]
    check_existing(tmp_path / "none", names, force=False)
    (tmp_path / "notes.txt").write_text("mine")
    check_existing(tmp_path, names, force=False)
    (tmp_path / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"holds config.json and 0 more .*force"):
        check_existing(tmp_path, names, force=False)
    check_existing(tmp_path, names, force=True)
    (tmp_path / "model-1.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"model-1.safetensors is no file"):
        check_existing(tmp_path, names, force=True)


def test_only_files_of_an_older_checkpoint_are_stale(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "notes.safetensors", "model.safetensors", "x"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path.parent / "outside.safetensors").write_bytes(b"x")
    listed = ["a.safetensors", "b.safetensors", "../outside.safetensors", "x", "gone.safetensors"]
    weight_map = {str(i): name for i, name in enumerate(listed)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    expected = ["b.safetensors", "model.safetensors", index.name]
    assert stale_files(tmp_path, ["a.safetensors"]) == expected
    index.write_text("{")
    assert stale_files(tmp_path, [index.name]) == ["model.safetensors"]


def test_room_is_looked_for_before_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    check_space(tmp_path / "new" / "deep", 1)
    with pytest.raises(OutOfSpaceError, match="GiB are needed"):
        check_space(tmp_path / "new" / "deep", 1 << 60)
    assert not (tmp_path / "new").exists()
    staged = tmp_path / FOLDER
    staged.mkdir()
    (staged / "a").write_bytes(b"x" * 100_000)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check_space(tmp_path, 90_000)  # what a run before has written counts as free
    with pytest.raises(OutOfSpaceError):
        check_space(tmp_path, 200_000)
