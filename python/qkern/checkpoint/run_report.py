"""What the reports of all runs tell that write a checkpoint from file to file. No torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from qkern.text_table import format_bytes, format_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What was read and written.

    Args:
        source: the checkpoint that was read.
        path: where the new one is.
        tied: names that share the memory of another tensor, which is the value.
        files: names of all files that were written.
        left_out: files of the source that were not copied, and why.
        dry_run: whether nothing was written.
        resumed: entries that a run before had finished.
        nbytes_read: of the files that were read.
        seconds: until the last byte was written; 0 in a dry run, as the next.
        seconds_commit: for making the files durable and renaming them, after that.
    """

    source: Path
    path: Path
    tied: dict[str, str]
    files: tuple[str, ...]
    left_out: dict[str, str]
    dry_run: bool
    resumed: int = 0
    nbytes_read: int = 0
    seconds: float = 0.0
    seconds_commit: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN and infinity, which JSON has not, become None."""
        return {
            "source": str(self.source),
            "path": str(self.path),
            "dry_run": self.dry_run,
            "resumed": self.resumed,
            "nbytes_read": self.nbytes_read,
            "seconds": self.seconds,
            "seconds_commit": self.seconds_commit,
            "tied": self.tied,
            "files": list(self.files),
            "left_out": self.left_out,
        }

    def ending(self, result: str) -> list[str]:
        """The last parts of a text: files that were not copied; where it is, how long it took."""
        parts = []
        if self.left_out:
            parts.append(format_table(list(self.left_out.items()), ("not copied", "why")))
        if self.dry_run:
            files = f"{len(self.files)} files would be, to {self.path}"
            return [*parts, f"nothing was written: {files}"]
        last = f"{self.path}: {len(self.files)} files{result}"
        if self.seconds > 0 and self.nbytes_read:
            last += (
                f"; read {format_bytes(self.nbytes_read)} in {self.seconds:.1f} s, "
                f"{self.nbytes_read / self.seconds / 1e9:.2f} GB/s, and "
                f"{self.seconds_commit:.1f} s to make the files durable"
            )
        return [*parts, last]


def plain(value: Any) -> Any:
    """Tuples as lists, and None for numbers that are not finite: what JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
