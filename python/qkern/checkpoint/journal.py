"""What a run has finished, so that the next one can go on: lines of JSON. No torch.

The first line says what the run was asked to do and of which inputs; each further line is a tensor
whose bytes are written. A line that a crash has cut off ends the reading, and is written over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from qkern.checkpoint.stream import Done, Errors

Head = dict[str, Any]


class Journal:
    """The journal of a staging folder; a context manager while it is written.

    Args:
        path: of the file.

    Attributes:
        head: of the file when it was opened; None without a file, or without a whole first line.
        done: what became of each tensor, by its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head: Head | None = None
        self.done: dict[str, Done] = {}
        self._file: FileIO | None = None
        self._size = self._read()

    def __enter__(self) -> Journal:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, head: Head) -> None:
        """Start anew, with no tensor done."""
        self.close()
        self.head, self.done, self._size = head, {}, 0
        self._write(head)

    def add(self, name: str, done: Done) -> None:
        """A tensor is written; a later line counts before an earlier one."""
        self.done[name] = done
        self._write({"tensor": name} | done_as_json(done))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = FileIO(self.path, "r+" if self._size else "w")
            self._file.truncate(self._size)
            self._file.seek(self._size)
        text = json.dumps(line).encode() + b"\n"
        while text:  # a full disk takes a part, and says why when it is offered the rest
            text = text[self._file.write(text) :]

    def _read(self) -> int:
        """Bytes of the lines that are whole."""
        size = 0
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        for line in content.splitlines(keepends=True):
            try:
                value = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(value, dict):
                    break
                if self.head is None:
                    self.head = value
                else:
                    self.done[str(value["tensor"])] = done_from_json(value)
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            size += len(line)
        return size


def done_as_json(done: Done) -> dict[str, Any]:
    """A result without its number, as JSON values."""
    content = done._asdict()
    del content["job"]
    return content | {"errors": None if done.errors is None else done.errors._asdict()}


def done_from_json(content: Mapping[str, Any]) -> Done:
    """The inverse of ``done_as_json``.

    Raises:
        KeyError, TypeError, ValueError: if it is none.
    """
    errors = content["errors"]
    return Done(
        job=-1,
        double_quant=bool(content["double_quant"]),
        offset=float(content["offset"]),
        crc=int(content["crc"]),
        crc_scales=int(content["crc_scales"]),
        errors=None if errors is None else Errors(**errors),
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two heads, a line each: name, value then, value now."""
    lines = []
    for key in dict.fromkeys([*then, *now]):
        name, (old, new) = f"{path}{key}", (then.get(key), now.get(key))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{name}: ")
        else:
            lines.append(f"{name}: {_show(old)} then, {_show(new)} now")
    return lines


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
