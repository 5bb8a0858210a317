"""A checkpoint's tensors by name, dense or quantized, one at a time through the files' maps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkern import flat_keys
from qkern.checkpoint.load import dtype_of_config, weight_files
from qkern.checkpoint.save import INDEX_NAME, TIED_KEY, WEIGHTS_NAME
from qkern.errors import CorruptFileError
from qkern.files import read_json
from qkern.formats import QuantFormat
from qkern.tensor import QuantizedTensor

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
# What other programs' weights are called, which hold code or another layout.
_FOREIGN: Final = (".bin", ".ckpt", ".gguf", ".h5", ".npz", ".pkl", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

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


class CheckpointReader:
    """A directory's safetensors files, or one file; a context manager that keeps them open.

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
        self.path = Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        self.tied: dict[str, str] = {}
        self._files: dict[Path, Any] = {}
        self._places: dict[str, Path] = {}  # file of every key
        self._keys: dict[str, list[str]] = {}  # of every quantized tensor
        with contextlib.ExitStack() as stack:
            for file in _files(self.path):
                self._open(file, stack)
            self._check_index()
            self._describe()
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
        return any(tensor.format is not None for tensor in self.tensors.values())

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """The tensor ``name``: a view of the mapped file, valid while this reader is open.

        Raises:
            CorruptFileError: if the parts of a quantized tensor contradict each other.
        """
        stored = self.tensors[name]
        if stored.format is None:
            return self._entry(name)
        entries = {key: self._entry(key) for key in self._keys[name]}
        with _naming(stored.file):
            return flat_keys.unflatten(entries, name, getattr(torch, stored.dtype))

    def _open(self, file: Path, stack: contextlib.ExitStack) -> None:
        hint = f"; {file.suffix} files are not read" if file.suffix in _FOREIGN else ""
        with _naming(file, hint):
            opened = stack.enter_context(safe_open(file, "pt"))
            keys = list(opened.keys())
            tied = json.loads((opened.metadata() or {}).get(TIED_KEY, "{}"))
        self._files[file] = opened
        odd = [key for key in keys if not key.isprintable()]
        if odd:
            msg = f"{file}: the name {odd[0]!r} of a tensor holds control characters"
            raise CorruptFileError(msg)
        twice = [key for key in keys if key in self._places]
        if twice:
            msg = f"{twice[0]} is in both {self._places[twice[0]]} and {file}"
            raise CorruptFileError(msg)
        self._places |= dict.fromkeys(keys, file)
        if isinstance(tied, dict):
            self.tied |= {str(name): str(owner) for name, owner in tied.items()}

    def _check_index(self) -> None:
        """Refuse shards that do not hold what the index says."""
        index = self.path / INDEX_NAME
        if not self.path.is_dir() or not index.exists():
            return
        listed: dict[str, str] = read_json(index)["weight_map"]
        found = {key: file.name for key, file in self._places.items()}
        wrong = sorted(key for key in listed.keys() | found if listed.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            msg = (
                f"{index} and its shards differ in {len(wrong)} tensors: {key} is listed in "
                f"{listed.get(key, 'no shard')} and found in {found.get(key, 'no shard')}"
            )
            raise CorruptFileError(msg)

    def _describe(self) -> None:
        quantized = set(flat_keys.prefixes(self._places))
        for key in self._places:
            owner = flat_keys.owner(key)
            if owner in quantized:
                self._keys.setdefault(owner, []).append(key)
        for key in sorted({*self._places, *quantized}, key=_natural):
            if key in quantized:
                self.tensors[key] = self._describe_quantized(key)
            elif flat_keys.owner(key) not in quantized:
                self.tensors[key] = self._describe_dense(key)
        self.tied = {
            name: owner
            for name, owner in self.tied.items()
            if name not in self.tensors and owner in self.tensors
        }

    def _describe_dense(self, key: str) -> StoredTensor:
        file = self._places[key]
        with _naming(file):
            view = self._files[file].get_slice(key)
            shape, dtype = tuple(view.get_shape()), str(view.get_dtype())
        bits = int(next(iter(re.findall(r"\d+", dtype)), "8"))  # BF16, F8_E4M3, BOOL
        nbytes = -(-math.prod(shape) * bits // 8)
        return StoredTensor(key, file, shape, READABLE.get(dtype, dtype), None, nbytes)

    def _describe_quantized(self, prefix: str) -> StoredTensor:
        keys = self._keys[prefix]
        file = self._places.get(prefix, self._places[keys[0]])
        with _naming(file):
            state = flat_keys.read_state({key: self._entry(key) for key in keys}, prefix)
        fmt: QuantFormat = state["format"]
        shape = tuple(state["shape"])
        dtype = str(state["dtype"] or self._dtype_of_rows).removeprefix("torch.")
        return StoredTensor(prefix, file, shape, dtype, fmt, fmt.nbytes(math.prod(shape)))

    @functools.cached_property
    def _dtype_of_rows(self) -> torch.dtype:
        directory = self.path if self.path.is_dir() else self.path.parent
        # bitsandbytes rounds a weight to float16 before it quantizes rows.
        return dtype_of_config(directory) or torch.float16

    def _entry(self, key: str) -> Tensor:
        file = self._places[key]
        with _naming(file):
            tensor: Tensor = self._files[file].get_tensor(key)
        return tensor


@contextlib.contextmanager
def _naming(file: Path, hint: str = "") -> Iterator[None]:
    """Errors of safetensors and of a quantization state, as ours, with the file's name."""
    try:
        yield
    except CorruptFileError as error:
        msg = f"{file}: {error}"
        raise CorruptFileError(msg) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        msg = f"{file}: not a readable safetensors file: {error}{hint}"
        raise CorruptFileError(msg) from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        msg = f"there is no {path} (models are not downloaded)"
        raise FileNotFoundError(msg)
    if not path.is_dir():
        msg = f"{path} is neither a directory nor a file"
        raise FileNotFoundError(msg)
    if not (path / INDEX_NAME).exists() and not (path / WEIGHTS_NAME).exists():
        others = sorted(file.name for file in path.glob("*.safetensors"))
        found = f"name one of its files: {', '.join(others[:5])}" if others else "no safetensors"
        msg = f"{path} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: {found}"
        raise FileNotFoundError(msg)
    return weight_files(path)


def _natural(name: str) -> list[int | str]:
    """Sorts "layers.10" after "layers.9"; text and numbers alternate."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
