"""Regular expressions that a file brings, matched against the paths of layers. No torch.

Python's ``re`` tries every way to match, so that a stranger's expression can take for ever. These
take time in proportion to expression and path, and know no look-around and no back-references.
"""

from __future__ import annotations

from collections.abc import Iterable

from qkern import _native  # noqa: TID251 - it has the matcher


def matching_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that PEFT finds for a key of ``rank_pattern`` or ``alpha_pattern``.

    Those of which ``pattern`` matches the whole, or all that follows one of the dots.

    Raises:
        FormatError: if it is no regular expression, too large, or of a kind that is not supported.
    """
    names = list(paths)
    return [
        name for name, yes in zip(names, _native.match_paths(pattern, names), strict=True) if yes
    ]
