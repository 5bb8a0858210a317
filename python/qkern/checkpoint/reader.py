"""A checkpoint's tensors by name, dense or quantized, one at a time through the files' maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkern import flat_keys
from qkern.checkpoint.source import Source, StoredTensor
from qkern.errors import CorruptFileError
from qkern.tensor import QuantizedTensor


class CheckpointReader:
    """A directory's safetensors files, or one file; a context manager that keeps them open.

    The files are checked when they are opened (``Source``), then mapped: one that is replaced by a
    rename stays as it was. One that is cut or written to while it is mapped ends the process on
    most systems (SIGBUS) or changes the values; where that can happen, read by ``Source``, which
    copies.

    Args:
        path: a model directory (one file, or shards with an index), or a safetensors file.

    Attributes:
        path: as given.
        tensors: by name, in natural order of the names: layer 2 before layer 10.
        tied: names that share the memory of another tensor, which is the value.

    Raises:
        FileNotFoundError: if there are no safetensors weights.
        CorruptFileError: if a file is not readable, or contradicts the index or itself.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._source = Source(path)
        self.path = self._source.path
        self.tensors: dict[str, StoredTensor] = self._source.tensors
        self.tied: dict[str, str] = self._source.tied
        with contextlib.ExitStack() as stack:
            self._maps = open_maps(self._source, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> CheckpointReader:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is."""
        return self._source.is_quantized

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` beside the files; empty if there is none."""
        return self._source.config

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """The tensor ``name``: a view of the mapped file, valid while this reader is open.

        Raises:
            CorruptFileError: if it is of a dtype that torch lacks, or was written to meanwhile.
        """
        stored = self.tensors[name]
        if stored.format is None:
            return self._entry(name)
        entries = {key: self._entry(key) for key in self._source.keys_of(name)}
        with _naming(stored.file):
            return flat_keys.unflatten(entries, name, getattr(torch, stored.dtype))

    def _entry(self, key: str) -> Tensor:
        entry = self._source.entries[key]
        with _naming(entry.file):
            tensor: Tensor = self._maps[entry.file].get_tensor(key)
        return tensor


def open_maps(source: Source, stack: contextlib.ExitStack) -> dict[Path, Any]:
    """Every file of a checkpoint as ``safetensors.safe_open`` maps it, until ``stack`` closes.

    Raises:
        CorruptFileError: if one was replaced since it was checked.
    """
    maps = {}
    for file in source.files:
        with _naming(file):
            maps[file] = stack.enter_context(safe_open(file, "pt"))
    source.check_unchanged()
    return maps


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of safetensors and of a quantized tensor's parts, as ours, with the file's name."""
    try:
        yield
    except CorruptFileError as error:
        msg = f"{file}: {error}"
        raise CorruptFileError(msg) from error
    except SafetensorError as error:
        msg = f"{file}: not a readable safetensors file: {error}"
        raise CorruptFileError(msg) from error
