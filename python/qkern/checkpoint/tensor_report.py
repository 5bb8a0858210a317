"""What ``inspect_checkpoint`` found of one tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from qkern.checkpoint.weight_statistics import ErrorStatistics, ScaleStatistics, ValueStatistics
from qkern.formats import QuantFormat


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Args:
        name: its key.
        file: name of the file that holds it.
        shape: of the dense tensor.
        dtype: of the dense tensor.
        stored: its format in the file; None if it is dense there.
        format: that of the file, or what it would be quantized to; None if it stays dense.
        reason: why it is dense, or what differs from what was asked; empty otherwise.
        nbytes_stored: in the file.
        nbytes: in ``format``.
        values: None for what is not floating point, or not readable.
        scales: None if it stays dense.
        error: against the dense tensor, or against the other checkpoint; None if there is no such.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    stored: QuantFormat | None
    format: QuantFormat | None
    reason: str
    nbytes_stored: int
    nbytes: int
    values: ValueStatistics | None
    scales: ScaleStatistics | None
    error: ErrorStatistics | None

    @property
    def numel(self) -> int:
        """Values of the dense tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales, or of the dense values, per value; None without values."""
        return 8 * self.nbytes / self.numel if self.numel else None

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the dense tensor."""
        if self.stored is None:
            return self.nbytes_stored
        return self.numel * (4 if self.dtype == "float32" else 2)

    @property
    def stored_as(self) -> str:
        """The format's name in the file, or the dtype of a dense tensor."""
        return self.stored.quant_type if self.stored else self.dtype

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        error = None
        if self.error is not None:
            error = {"relative_rms": self.error.relative_rms} | dataclasses.asdict(self.error)
        return {
            "name": self.name,
            "file": self.file,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "stored_as": self.stored_as,
            "format": None if self.format is None else dataclasses.asdict(self.format),
            "reason": self.reason,
            "bits_per_weight": self.bits_per_weight,
            "nbytes_stored": self.nbytes_stored,
            "nbytes": self.nbytes,
            "values": None if self.values is None else dataclasses.asdict(self.values),
            "scales": None if self.scales is None else dataclasses.asdict(self.scales),
            "error": error,
        }

    def findings(self) -> list[str]:
        """What a person should know of it."""
        found = []
        if self.values is not None and self.values.nonfinite:
            place = self.values.first_nonfinite or 0
            index = [int(i) for i in np.unravel_index(place, self.shape)]
            found.append(
                f"{self.values.nonfinite} values are NaN or infinite, the first at {index}"
            )
        if self.error is not None and self.error.unlike_nonfinite:
            count = self.error.unlike_nonfinite
            found.append(f"{count} values are NaN or infinite in one of the two only")
        if self.format is not None and self.reason:
            found.append(self.reason)
        return found + self._findings_of_scales()

    def _findings_of_scales(self) -> list[str]:
        if self.scales is None or self.stored is None:
            return []
        scales, found = self.scales, []
        if scales.nonfinite:
            found.append(f"{scales.nonfinite} of {scales.blocks} scales are NaN or infinite")
        if scales.turned:
            found.append(
                f"{scales.turned} of {scales.blocks} scales have another sign than before double "
                "quantization, so have the values of their blocks"
            )
        count = scales.negative - scales.turned
        if count and self.stored.code is None:  # the methods of 4-bit formats may choose signs
            found.append(f"{count} of {scales.blocks} scales are negative, which no maximum is")
        return found
