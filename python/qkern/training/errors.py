"""What a training run raises besides ``qkern.errors``. No torch here."""

from __future__ import annotations

from pathlib import Path

from qkern.errors import NonFiniteError, QkernError


class SettingError(QkernError, ValueError):
    """A setting of a run that is out of its range, or that contradicts another."""


class DivergedError(NonFiniteError):
    """A loss, gradient or adapter that became NaN or infinite."""


class TrainingInterrupted(KeyboardInterrupt):
    """A run that was stopped by hand.

    Args:
        step: optimizer steps done.
        checkpoint: from where ``resume`` continues; None if nothing was saved yet.
    """

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        saved = (
            f"saved {checkpoint}; continue with resume (--resume)"
            if checkpoint
            else "nothing was saved yet"
        )
        super().__init__(f"interrupted after step {step}: {saved}")
        self.step = step
        self.checkpoint = checkpoint
