"""Where a checkpoint may be written, and what of an older one it replaces. No torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from qkern.checkpoint.source import INDEX_NAME, WEIGHTS_NAME
from qkern.checkpoint.staging import FOLDER, writing
from qkern.errors import CorruptFileError, OutOfSpaceError, OutputError
from qkern.files import read_json
from qkern.text_table import format_bytes

# What would be opened in place of a new checkpoint, or on top of it.
_OLDER: Final = (
    WEIGHTS_NAME,
    INDEX_NAME,
    "adapter_config.json",
    "adapter_model.safetensors",
)
# What makes a folder that of a model, for one program or another.
_MODEL: Final = re.compile(r"config\.json|.*\.safetensors|.*\.index\.json|pytorch_model.*\.bin")


def check_place(source: Path, destination: Path) -> None:
    """Refuse a destination that is no folder of its own.

    Args:
        source: the folder, or file, that is read.
        destination: the folder to write.

    Raises:
        OutputError: for a symbolic link, for what is no folder, and for the source or a place
            inside of it.
    """
    with writing(destination):
        if destination.is_symlink():
            msg = f"{destination} is a symbolic link: name the folder that it leads to"
            raise OutputError(msg)
        if destination.exists() and not destination.is_dir():
            msg = f"{destination} is no folder: it is left as it is, name another one"
            raise OutputError(msg)
        folder = (source if source.is_dir() else source.parent).resolve()
        if folder in (destination.resolve(), *destination.resolve().parents):
            where = "is" if folder == destination.resolve() else "lies in"
            msg = f"{destination} {where} the source, which is never written: name another folder"
            raise OutputError(msg)


def check_existing(destination: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse to replace files, unless forced; and what no file can replace.

    Args:
        destination: the folder to write.
        names: of the files to be written.
        force: whether files may be replaced.

    Raises:
        OutputError: naming what is in the way.
    """
    with writing(destination):
        found = [
            name
            for name in dict.fromkeys([*names, *_OLDER])
            if (destination / name).exists() or (destination / name).is_symlink()
        ]
        odd = [name for name in found if not (destination / name).is_file()]
        odd = [name for name in odd if not (destination / name).is_symlink()]
        if odd:
            msg = f"{destination / odd[0]} is no file, and is not replaced: name another folder"
            raise OutputError(msg)
        if found and not force:
            msg = (
                f"{destination} holds {found[0]} and {len(found) - 1} more files that would be "
                "replaced: name another folder, or replace them with force (--force)"
            )
            raise OutputError(msg)


def check_strangers(destination: Path, names: Collection[str]) -> None:
    """Refuse a folder with files of another model: with them it would be opened as one.

    Args:
        destination: the folder to write.
        names: of the files to be written.

    Raises:
        OutputError: naming one of them.
    """
    if not destination.is_dir():
        return
    with writing(destination):
        found = sorted(
            path.name
            for path in destination.iterdir()
            if path.name not in names and _MODEL.fullmatch(path.name) and not path.is_dir()
        )
    if found:
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        msg = (
            f"{destination} holds {found[0]}{more} of another model, with which the new files "
            "would be opened: name a folder of its own, or write beside them with force (--force)"
        )
        raise OutputError(msg)


def stale_files(destination: Path, names: Sequence[str]) -> list[str]:
    """Weights and adapters of an older checkpoint that ``names`` do not replace.

    Files that its index does not name are not known, and not among them.
    """
    index, shards = destination / INDEX_NAME, []
    if index.is_file():
        try:
            listed = read_json(index).get("weight_map")
        except CorruptFileError:
            listed = None
        if isinstance(listed, dict):
            shards = sorted({str(name) for name in listed.values()})
    # Only names of files that lie in the folder itself.
    plain = [n for n in shards if n == Path(n).name and "\\" not in n and n not in ("", ".", "..")]
    plain = [name for name in plain if name.endswith(".safetensors")]
    return [
        name
        for name in dict.fromkeys([*plain, *_OLDER])
        if name not in names and (destination / name).is_file()
    ]


def check_space(destination: Path, nbytes: int) -> None:
    """Refuse to begin what does not fit.

    Args:
        destination: the folder to write; need not exist.
        nbytes: that all files have at most; what a run before has written already counts as free.

    Raises:
        OutOfSpaceError: with both numbers.
    """
    with writing(destination):
        folder = next(p for p in (destination, *destination.absolute().parents) if p.exists())
        staged = (destination / FOLDER).rglob("*") if folder == destination else ()
        present = sum(_allocated(path) for path in staged)
        free = shutil.disk_usage(folder).free + present
        if nbytes > free:
            msg = (
                f"{destination}: {format_bytes(nbytes)} are needed, {format_bytes(free)} are free: "
                "make room, or write to another disk"
            )
            raise OutOfSpaceError(msg)


def _allocated(path: Path) -> int:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return getattr(found, "st_blocks", 0) * 512
