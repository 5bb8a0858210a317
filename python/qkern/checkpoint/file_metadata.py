"""What the headers of qkern's own files say beside their tensors. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from qkern.errors import CorruptFileError

# Metadata key: entries that were left out because they share another one's memory.
TIED_KEY: Final = "qkern_tied"
# Metadata key: the oldest version of qkern that can read the file; not written for files that all
# versions can.
NEEDS_KEY: Final = "qkern_needs"


def read_tied(file: Path, text: str) -> dict[str, str]:
    """The entries that were left out, and the key that each shares its memory with.

    Raises:
        CorruptFileError: for anything but an object of names.
    """
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{file}: its metadata {TIED_KEY} is not valid JSON: {error}"
        raise CorruptFileError(msg) from error
    if not isinstance(tied, dict) or not all(isinstance(owner, str) for owner in tied.values()):
        msg = f"{file}: its metadata {TIED_KEY} is no object of names"
        raise CorruptFileError(msg)
    return tied


def check_needs(file: Path, needed: str) -> None:
    """Refuse a file that says it needs a newer qkern, or says so in a way not known here.

    Raises:
        CorruptFileError: naming both versions.
    """
    from qkern import __version__

    if not re.fullmatch(r"\d{1,9}(\.\d{1,9}){0,3}", needed, re.ASCII) or (
        _version(needed) > _version(__version__)
    ):
        msg = f"{file}: made by a newer qkern: needs {needed[:40]!r}, this is {__version__}"
        raise CorruptFileError(msg)


def _version(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)[:3]]
