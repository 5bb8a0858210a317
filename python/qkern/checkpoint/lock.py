"""One writer to a directory: a lock that ends with its process, however that ends. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Final

from qkern.errors import LockedError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# What a file system says that has no locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LOCKED_BYTE: Final = 1 << 20  # beyond the text: Windows lets nobody read what is locked


class WriterLock:
    """The lock of a folder that one process writes.

    The system releases it when the process ends, so a lock file of a dead process is taken over.
    Where the file system has no locks, the process id in the file decides.

    Args:
        path: of the lock file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock, or refuse at once.

        Raises:
            LockedError: if another process has it, naming its id.
            OSError: if the file cannot be made.
        """
        while self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who had it has just removed the folder
                continue
            try:
                self._take(handle)
            except BaseException:
                os.close(handle)
                raise
            if self._is_at_path(handle):
                self._handle = handle
            else:  # locked what its owner has removed meanwhile
                os.close(handle)
        with contextlib.suppress(OSError):  # a full disk: the number is for people
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Give the lock back; its file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take(self, handle: int) -> None:
        try:
            if _try_lock(handle):
                return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not _is_alive(_read_pid(handle)):
                return
        pid = _read_pid(handle)
        who = "another process" if pid is None else f"process {pid}"
        msg = f"{self.path.parent.parent} is being written by {who}: wait for its end, or stop it"
        raise LockedError(msg)

    def _is_at_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False


if sys.platform == "win32":

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _read_pid(handle: int) -> int | None:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 32).strip()
    return int(text) if text.isdigit() else None


def _is_alive(pid: int | None) -> bool:
    """Whether a process of this machine has the id; our own does not count."""
    if pid is None or pid == os.getpid() or sys.platform == "win32":
        return False  # os.kill would end it on Windows, where locks are always there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
