"""What commands say on stderr."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest

from qkern.cli.terminal import say


class Interrupted(io.RawIOBase):
    """A file that a signal reaches in the middle of the first write to it."""

    def __init__(self, handle: int) -> None:
        self.handle, self.writes = handle, 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.handle

    def write(self, data: object) -> int:
        self.writes += 1
        if self.writes == 1:
            signal.raise_signal(signal.SIGUSR1)
        return os.write(self.handle, data)  # type: ignore[arg-type]


def test_a_signal_handler_may_speak_in_the_middle_of_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted(write)))
    monkeypatch.setattr(sys, "stderr", stream)
    before = signal.signal(signal.SIGUSR1, lambda *_: say("from the handler"))
    try:
        say("from the program")
    finally:
        signal.signal(signal.SIGUSR1, before)
    stream.detach().detach()
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert set(lines) == {"from the handler", "from the program"}
