"""Files are written beside their place, and all of them are renamed into it at the end. No torch.

``DST/.qkern-partial`` holds everything until then: it is on the file system of DST, also where
that is a mount point.

    lock            held by the process that writes
    journal.jsonl   what was asked for, and which tensors are written
    files/          the output files; *.scales beside the folder are their spills
    commit.json     what is renamed and removed; from here on a run can only end well

A run that is killed can be resumed, one that was killed while renaming is finished by the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qkern.checkpoint.journal import Journal
from qkern.checkpoint.lock import WriterLock
from qkern.errors import CorruptFileError, OutOfSpaceError, OutputError, QkernError
from qkern.files import read_json, sync_directory, write_json

FOLDER: Final = ".qkern-partial"
_FULL: Final = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT") if hasattr(errno, name)
)


class Staging:
    """The staging folder of a directory, locked; a context manager.

    Args:
        directory: DST.

    Attributes:
        directory: as given.
        path: of the folder.
        files: where output files are written, under their final names.

    Raises:
        LockedError: if another process writes there.
        OutputError: if it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / FOLDER
        self.files = self.path / "files"
        self._commit_file = self.path / "commit.json"
        self._lock = WriterLock(self.path / "lock")
        self._made_directory = False
        self._is_cleared = False

    def __enter__(self) -> Staging:  # noqa: PYI034 - typing.Self needs Python 3.11
        with writing(self.directory):
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
                msg = f"{self.path} is no folder: remove it, or write to another place"
                raise OutputError(msg)
            self._made_directory = not self.directory.exists()
            self._lock.acquire()
            try:
                self.files.mkdir(exist_ok=True)
                self.journal = Journal(self.path / "journal.jsonl")
            except BaseException:
                self._remove_lock()
                self._lock.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.journal.close()
        kept = self._commit_file.exists() or self.journal.path.exists()
        if not self._is_cleared and not kept:
            self.clear()
        self._lock.release()
        if sys.platform == "win32" and self._is_cleared:  # no open file is removed there
            with contextlib.suppress(OSError):
                self._lock.path.unlink()
                self.path.rmdir()

    def spill(self, name: str) -> Path:
        """The spill of an output file."""
        return self.path / f"{name}.scales"

    def pending_commit(self) -> dict[str, Any] | None:
        """What a run that was killed while renaming has left to do; None if nothing.

        Raises:
            CorruptFileError: if the file says nothing that ``commit`` writes.
        """
        if not self._commit_file.exists():
            return None
        content = read_json(self._commit_file)
        for key in ("names", "stale"):
            names = content.get(key)
            if not isinstance(names, list) or not all(_is_inside(name) for name in names):
                msg = f"{self._commit_file}: {key} is no list of files of {self.directory}"
                raise CorruptFileError(msg)
        return content

    def commit(self, names: Sequence[str], stale: Sequence[str], record: dict[str, Any]) -> None:
        """Rename the staged files into place.

        Args:
            names: of all staged files, in the order of renaming; "/" separates folders.
            stale: files of DST to remove after that.
            record: kept with them for ``pending_commit`` of a later run.

        Raises:
            OutputError: if the files cannot be made durable; then none of them is renamed.
        """
        content = {**record, "names": list(names), "stale": list(stale)}
        with writing(self.directory):
            try:
                for name in names:
                    with (self.files / name).open("rb+") as file:
                        os.fsync(file.fileno())
                for folder in {self.files, *((self.files / name).parent for name in names)}:
                    sync_directory(folder)
                write_json(self._commit_file, content)
            except OSError:  # what the disk did not take is not to be trusted later
                self.clear()
                raise
        self.roll_forward(content)
        self.clear()

    def roll_forward(self, content: dict[str, Any]) -> None:
        """Do what is left of a commit; the folder stays."""
        with writing(self.directory):
            folders = {self.directory}
            for name in content["names"]:
                staged, target = self.files / name, self.directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
                if staged.exists():
                    staged.replace(target)
            for folder in folders:
                sync_directory(folder)
            for name in content["stale"]:
                (self.directory / name).unlink(missing_ok=True)
            sync_directory(self.directory)

    def restart(self) -> None:
        """Forget an unfinished run; the folder stays locked."""
        self.journal.close()
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lock.path:
                path.unlink()
        self.files.mkdir()
        self.journal = Journal(self.journal.path)

    def clear(self) -> None:
        """Remove the folder, and DST if it was made for it and holds nothing."""
        self.journal.close()
        self._is_cleared = True  # from now on the folder may be that of another process
        # What says that there is nothing left to do goes last.
        last = (self._commit_file, self._lock.path)
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in last:
                path.unlink()
        self._commit_file.unlink(missing_ok=True)
        self._remove_lock()

    def _remove_lock(self) -> None:
        """Remove the lock file, and the folders if they are empty then."""
        with contextlib.suppress(OSError):  # the next run does what cannot be done now
            self._lock.path.unlink()
            self.path.rmdir()
            if self._made_directory:
                self.directory.rmdir()


def _is_inside(name: object) -> bool:
    """Whether a name is that of a file in the folder or below it."""
    if not isinstance(name, str) or not name or "\\" in name or ":" in name:
        return False
    return not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while something is written under ``path``, as ours."""
    try:
        yield
    except QkernError:
        raise
    except OSError as error:
        _raise_if_full(error, path)
        msg = f"{error.filename or path}: cannot be written: {error.strerror or error}"
        raise OutputError(msg) from error


@contextlib.contextmanager
def streaming(path: Path) -> Iterator[None]:
    """The same while files are read too: only a full disk is known to be about ``path``."""
    try:
        yield
    except QkernError:
        raise
    except OSError as error:
        _raise_if_full(error, path)
        raise


def _raise_if_full(error: OSError, path: Path) -> None:
    if error.errno in _FULL:
        why = error.strerror or str(error)
        msg = f"{error.filename or path}: {why}: free some room, or write to another disk"
        raise OutOfSpaceError(msg) from error
