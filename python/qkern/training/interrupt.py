"""Ctrl-C during training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback


class InterruptCallback(TrainerCallback):
    """Stops at the end of a step, with a checkpoint, once ``requested`` is set.

    Args:
        say: gets a line for people when Ctrl-C arrives.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say = say

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While active, the first Ctrl-C sets ``requested``; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True
        self._say("interrupted: finishing the step and saving a checkpoint (again: stop at once)")
