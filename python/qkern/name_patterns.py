"""How callers name modules and tensors: whole paths, ends of paths, globs. No torch."""

from __future__ import annotations

import fnmatch


def matches(name: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern: itself, its end after a dot, or a glob."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
