"""The tensors of an adapter's file, by what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from torch import Tensor

from qkern.adapter_config import PREFIX, pair_keys
from qkern.errors import AdapterMismatchError, CorruptFileError

# The end of the keys of DoRA's magnitudes in files; some have ".weight" after it.
MAGNITUDE: Final = "lora_magnitude_vector"


class AdapterTensors(NamedTuple):
    """What a file holds for a layer.

    Args:
        A: (r, in_features).
        B: (out_features, r).
        magnitude: (out_features,) with DoRA.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None


class AdapterFile:
    """The tensors of a file; what is taken is gone, and nothing may be left.

    Args:
        tensors: by key.
        directory: of the adapter, for errors.
        use_dora: whether layers have magnitudes.
    """

    def __init__(self, tensors: dict[str, Tensor], directory: Path, *, use_dora: bool) -> None:
        self.directory, self.use_dora = directory, use_dora
        self._left = tensors
        self._magnitudes: dict[str, Tensor] = {}
        for key in list(tensors) if use_dora else ():
            name = key.removesuffix(".weight").removeprefix(PREFIX)
            if name.endswith(f".{MAGNITUDE}"):
                self._magnitudes[name.removesuffix(f".{MAGNITUDE}")] = tensors.pop(key)

    def module(self, name: str) -> dict[str, Tensor]:
        """Take the entries of a module that is saved as a whole."""
        start = f"{PREFIX}{name}."
        keys = [key for key in self._left if key.startswith(start) and ".lora_" not in key]
        return {key.removeprefix(start): self._left.pop(key) for key in keys}

    def pairs(self) -> dict[str, AdapterTensors]:
        """Take what is left, by the layers' paths.

        Raises:
            AdapterMismatchError: for an entry that is none of a layer, and for a part that is
                missing or does not fit the others.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in self._left.items()}
        pairs = {}
        for name, (A, B) in pair_keys(shapes, self.directory).items():
            magnitude = self._magnitudes.pop(name, None)
            pairs[name] = AdapterTensors(self._left[A], self._left[B], magnitude)
            expected = (shapes[B][0],) if self.use_dora else None
            found = None if magnitude is None else tuple(magnitude.shape)
            if found != expected:
                msg = f"{self.directory}: {name} needs {MAGNITUDE} of {expected}, found {found}"
                raise AdapterMismatchError(msg)
        if self._magnitudes:
            msg = f"{self.directory}: {next(iter(self._magnitudes))} has {MAGNITUDE} alone"
            raise AdapterMismatchError(msg)
        return pairs


def read_tensors(file: Path, *, use_dora: bool) -> AdapterFile:
    """The tensors of a safetensors file.

    Raises:
        CorruptFileError: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return AdapterFile(load_file(file), file.parent, use_dora=use_dora)
    except SafetensorError as error:
        msg = f"{file}: not a readable safetensors file: {error}"
        raise CorruptFileError(msg) from error
