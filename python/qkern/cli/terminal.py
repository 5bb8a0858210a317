"""What the commands say to a person, on stderr."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO


def say(line: str) -> None:
    """A line on stderr, from a signal handler too."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except RuntimeError:  # the signal came in the middle of another write, which locks the stream
        os.write(sys.stderr.fileno(), f"{line}\n".encode())


def wants_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that takes colours (https://no-color.org)."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, to be told (bytes done since, bytes of all).

    None, and so no bar, where stderr is no terminal or tqdm is not installed.
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield None
        return
    from tqdm import tqdm

    settings = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    with tqdm(desc=what, file=sys.stderr, dynamic_ncols=True, **settings) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield advance
