"""What the exit codes of every command mean; 1 is left to crashes."""

from __future__ import annotations

from typing import Final

from qkern.errors import (
    CoverageError,
    FormatError,
    LostDeltaError,
    MissingDependencyError,
    NativeError,
    OutputError,
    QkernError,
)
from qkern.training.errors import DivergedError, SettingError

DONE: Final = 0
USAGE: Final = 2
NO: Final = 3  # the answer is no: does not fit, below a threshold, diverged
BAD_INPUT: Final = 4
IO: Final = 5  # a file, a device or an installation that is not there
INTERRUPTED: Final = 130

_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (KeyboardInterrupt, INTERRUPTED),
    (SettingError, USAGE),
    (FormatError, USAGE),
    (CoverageError, NO),
    (LostDeltaError, NO),
    (DivergedError, NO),
    (MissingDependencyError, IO),
    (NativeError, IO),
    (OutputError, IO),
    (QkernError, BAD_INPUT),
    (OSError, IO),
)


def of(error: BaseException) -> int:
    """The exit code of an error; the first class that fits decides."""
    return next((code for cls, code in _CODES if isinstance(error, cls)), 1)
