"""What an adapter is trained to be merged into, and how its file says so. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

from qkern.codec import check_method
from qkern.errors import CorruptFileError, QkernError
from qkern.formats import QuantFormat

# Metadata key of an adapter's weights, which PEFT ignores.
MERGE_KEY: Final = "qkern_merge_into"


@dataclasses.dataclass(frozen=True)
class MergeTarget:
    """What a merge will quantize to.

    Args:
        format: of the merged weight.
        method: "absmax" or "search", see ``qkern.quantize``.

    Raises:
        FormatError: for a format that nothing is quantized to, or a method that it does not have.
    """

    format: QuantFormat
    method: str = "absmax"

    def __post_init__(self) -> None:
        self.format.check_encodes()
        check_method(self.method, self.format, has_importance=False)


def targets_as_text(targets: Mapping[str, MergeTarget]) -> str:
    """JSON of the targets of layers, by path: an object for each, with its layers."""
    groups: dict[MergeTarget, list[str]] = {}
    for name, target in targets.items():
        groups.setdefault(target, []).append(name)
    return json.dumps(
        [
            dataclasses.asdict(target.format) | {"method": target.method, "layers": names}
            for target, names in groups.items()
        ]
    )


def targets_of_text(text: str, file: object) -> dict[str, MergeTarget]:
    """The target of each layer that the metadata of ``file`` names.

    Raises:
        CorruptFileError: for anything else than ``targets_as_text`` writes.
    """
    found = {}
    try:
        groups: Any = json.loads(text)
        for group in groups:
            names, method = group.pop("layers"), group.pop("method")
            target = MergeTarget(QuantFormat(**group), method)
            found.update({str(name): target for name in names})
    except (ValueError, TypeError, AttributeError, KeyError, QkernError) as error:
        msg = f"{file}: its metadata {MERGE_KEY} is not readable: {error}"
        raise CorruptFileError(msg) from error
    return found
