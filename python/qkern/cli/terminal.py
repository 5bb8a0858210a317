"""What the commands say to a person, on stderr."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(line: str) -> None:
    """A line on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def wants_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that takes colours (https://no-color.org)."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain
