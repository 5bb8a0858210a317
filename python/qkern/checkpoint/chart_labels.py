"""Names of tensors as the labels of a chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_LONGEST: Final = 60  # characters of a label


def layer_number(name: str) -> int | None:
    """The first number that is a whole part of the path; None if there is none."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?=\.|$)", name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """The name without its numbers: the same for every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name.removesuffix(".weight"))


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """Without the beginning that all of them share, in whole parts of the path."""
    split = [kind.split(".") for kind in kinds]
    shared = 0
    while split and all(
        len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split
    ):
        shared += 1
    return {kind: ".".join(parts[shared:]) for kind, parts in zip(kinds, split, strict=True)}


def label_of(name: str) -> str:
    """A name as matplotlib shows it as it is: no mathematics, not hidden, not too long."""
    name = name.removesuffix(".weight")
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 2 :]}"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
