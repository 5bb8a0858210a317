"""A checkpoint as its headers tell it: which tensors, where, and how they are quantized. No torch.

Opening one checks all that can be checked without reading weights: index, headers, states, tables
and sizes. What is described after that is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qkern import _native, entry_keys  # noqa: TID251 - it reads the headers
from qkern.checkpoint.file_metadata import NEEDS_KEY, TIED_KEY, check_needs, read_tied
from qkern.entry_keys import Described, State, scales_key
from qkern.errors import CorruptFileError
from qkern.files import pickle_advice, read_json
from qkern.formats import DTYPES, QuantFormat

WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = f"{WEIGHTS_NAME}.index.json"

# safetensors' names of what can be read as numbers here; others are listed, not read.
READABLE: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Of the entries that are looked into; files are little-endian. Others are looked at as bytes.
_NUMPY: Final = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
# What other programs' weights are called, which hold code or another layout.
_PICKLES: Final = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_FOREIGN: Final = (".gguf", ".h5", ".npz")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file.

    Args:
        key: its name there.
        file: that holds it.
        dtype: safetensors' name: "BF16".
        shape: as stored.
        begin: its first byte, from the start of the file.
        end: where it ends.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file: those that dtype and shape ask for."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, dense or quantized.

    Args:
        name: key of the tensor; of its codes if it is quantized.
        file: that holds it.
        shape: of the dense tensor.
        dtype: torch's name, of the dense tensor; safetensors' own name for what is not read. Files
            of int8 rows do not say it: that of ``config.json``, else float16.
        format: how it is quantized; None for a dense tensor.
        nbytes: as stored: codes and scales of a quantized tensor, tables not counted.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    format: QuantFormat | None
    nbytes: int

    @property
    def numel(self) -> int:
        """Values of the dense tensor."""
        return math.prod(self.shape)

    @property
    def is_readable(self) -> bool:
        """Whether ``CheckpointReader.read`` can give its values."""
        return self.dtype in READABLE.values()


class Source:
    """A directory's safetensors files, or one file: checked, described, and read by place.

    No file stays open. One that was replaced or written to since is refused when it is read.

    Args:
        path: a model directory (one file, or shards with an index), or a safetensors file.

    Attributes:
        path: as given.
        files: in the order of their names.
        entries: every tensor of the files, by key, in the order of files and places.
        tensors: by name, in natural order of the names: layer 2 before layer 10. The entries of a
            quantized tensor are one.
        tied: names that share the memory of another tensor, which is the value. Of a quantized one
            tables and state are entries all the same; they are checked, and are no tensors.
        tied_entries: the same by keys of entries: what is not in ``entries``, and the key that is.
        metadata: strings in the headers of the files.

    Raises:
        FileNotFoundError: if there are no safetensors weights, or shards are missing.
        CorruptFileError: if a file is not readable, or contradicts the index or itself.
        OSError: if a file cannot be opened.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        with _explaining(self.path):
            files, entries, metadata, stamps = _native.read_checkpoint(self.path)
        self.files = tuple(Path(file) for file in files)
        self._stamps = dict(zip(self.files, stamps, strict=True))
        self.entries = {
            key: Entry(key, self.files[file], dtype, shape, begin, end)
            for key, dtype, shape, file, begin, end in entries
        }
        tied: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        for file, strings in zip(self.files, metadata, strict=True):
            check_needs(file, strings.get(NEEDS_KEY, "0"))
            tied |= read_tied(file, strings.get(TIED_KEY, "{}"))
            self.metadata |= strings
        self.tied_entries = {
            key: owner
            for key, owner in tied.items()
            if key not in self.entries and owner in self.entries
        }
        self._keys: dict[str, list[str]] = {}
        self._states: dict[str, State] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._describe()

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is."""
        return bool(self._states)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` beside the files; empty if there is none.

        Raises:
            CorruptFileError: if it is not a JSON object.
        """
        file = self.path / "config.json" if self.path.is_dir() else self.path.parent / "config.json"
        return read_json(file) if file.exists() else {}

    def keys_of(self, name: str) -> list[str]:
        """Keys of the entries of a quantized tensor; of a dense one its own."""
        return list(self._keys.get(name, [name]))

    def state(self, name: str) -> State:
        """Format, shape, dtype and offset of a quantized tensor, checked against its entries.

        ``dtype`` is never None here: what int8 rows do not say is taken from ``config.json``.

        Raises:
            KeyError: if there is no quantized tensor of that name.
        """
        return self._states[name]

    def read_bytes(
        self, key: str, first: int = 0, nbytes: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """The bytes of an entry, or so many of them from ``first`` on.

        Raises:
            CorruptFileError: if the file is not the one any more that was described.
            OSError: if it cannot be read.
        """
        entry = self.entries[key]
        with entry.file.open("rb", buffering=0) as opened:
            self._check_stamp(os.fstat(opened.fileno()), entry.file)
            content = np.empty(entry.nbytes - first if nbytes is None else nbytes, np.uint8)
            opened.seek(entry.begin + first)
            left = memoryview(content.data)
            while left:
                count = opened.readinto(left)
                if not count:
                    msg = f"{entry.file}: it became shorter while {key} was read"
                    raise CorruptFileError(msg)
                left = left[count:]
        return content

    def check_unchanged(self) -> None:
        """Refuse files that are not those any more that were described.

        Raises:
            CorruptFileError: if one was replaced or written to.
        """
        for file in self.files:
            self._check_stamp(file.stat(), file)

    def _check_stamp(self, found: os.stat_result, file: Path) -> None:
        if (found.st_size, found.st_mtime_ns) != self._stamps[file]:
            msg = f"{file}: it was replaced or written to since its header was read: open it again"
            raise CorruptFileError(msg)

    def _describe(self) -> None:
        quantized = set(entry_keys.prefixes(self.entries))
        for key in (*self.entries, *self.tied_entries):
            owner = entry_keys.owner(key)
            if owner in quantized:
                self._keys.setdefault(owner, []).append(key)
        for key in sorted({*self.entries, *quantized}, key=natural_order):
            if key in quantized:
                self.tensors[key] = self._describe_quantized(key)
            elif entry_keys.owner(key) not in quantized:
                entry = self.entries[key]
                dtype = READABLE.get(entry.dtype, entry.dtype)
                self.tensors[key] = StoredTensor(
                    key, entry.file, entry.shape, dtype, None, entry.nbytes
                )
        for name in quantized & self.tied_entries.keys():
            self._check_tied(name, self.tied_entries[name])
            del self.tensors[name], self._states[name], self._keys[name]
        self.tied = {k: owner for k, owner in self.tied_entries.items() if owner in self.tensors}

    def _check_tied(self, name: str, owner: str) -> None:
        """Refuse a quantized tensor that shares another one's codes, and is not the same."""
        state = self._states[name]
        same = state == self._states.get(owner) and owner not in self.tied_entries
        parts = [scales_key(key, state.format) for key in (name, owner)]
        nested = [f"{key}.nested_absmax" for key in (name, owner)]
        for key, other in (parts, nested) if state.format.double_quant else (parts,):
            same = same and self.tied_entries.get(key) == other
        if not same:
            msg = f"{self.path}: {name} is tied to {owner}, but has scales or a state of its own"
            raise CorruptFileError(msg)

    def _describe_quantized(self, prefix: str) -> StoredTensor:
        keys = self._keys[prefix]
        first = prefix if prefix in self.entries else keys[0]  # the codes may be missing, or tied
        file = self.entries[first].file
        entries = {key: self._described(key) for key in keys}
        try:
            state = entry_keys.read_state(entries, prefix)
            entry_keys.check_parts(entries, prefix, state)
        except CorruptFileError as error:
            msg = f"{file}: {error}"
            raise CorruptFileError(msg) from error
        dtype = state.dtype or self._dtype_of_rows
        self._states[prefix] = state._replace(dtype=dtype)
        nbytes = state.format.nbytes(math.prod(state.shape))
        return StoredTensor(prefix, file, state.shape, dtype, state.format, nbytes)

    @functools.cached_property
    def _dtype_of_rows(self) -> str:
        # bitsandbytes rounds a weight to float16 before it quantizes rows.
        return dtype_of_config(self.config) or "float16"

    def _described(self, key: str) -> Described:
        key = self.tied_entries.get(key, key)
        entry = self.entries[key]
        dtype = READABLE.get(entry.dtype, entry.dtype)

        def values() -> npt.NDArray[Any]:
            return self.read_bytes(key).view(_NUMPY.get(entry.dtype, "u1"))

        return Described(dtype, entry.shape, values)


def dtype_of_config(config: Mapping[str, Any]) -> str | None:
    """Name of the dtype that the content of a ``config.json`` states; None if it does not."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Errors of other programs' files say what these are."""
    try:
        yield
    except CorruptFileError as error:
        if path.suffix in _PICKLES:
            msg = f"{error}; {pickle_advice(path)}"
        elif path.suffix in _FOREIGN:
            msg = f"{error}; {path.suffix} files are not read"
        else:
            raise
        raise CorruptFileError(msg) from error
    except FileNotFoundError as error:
        pickled = sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else []
        if not pickled:
            raise
        msg = f"{error}: {pickle_advice(pickled[0])}"
        raise CorruptFileError(msg) from error


def natural_order(name: str) -> list[str | tuple[int, str]]:
    """Sorts "layers.10" after "layers.9"; text and numbers (by length, then digits) alternate."""
    parts = re.split(r"(\d+)", name)
    numbers = (part.lstrip("0") for part in parts[1::2])
    keys: list[str | tuple[int, str]] = [*parts]
    keys[1::2] = [(len(number), number) for number in numbers]
    return keys
