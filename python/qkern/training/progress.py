"""A progress bar on stderr: loss, tokens per second, peak memory."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from qkern.text_table import format_bytes


class ProgressCallback(TrainerCallback):
    """One line on stderr that is rewritten at every step; on a terminal or not."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that the run continues from."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest figures and advance."""
        if self._bar is None or not logs or "loss" not in logs:
            return
        figures = {
            "loss": f"{logs['loss']:.4f}",
            "tok/s": f"{logs['tokens_per_second']:.0f}",
            "peak": format_bytes(logs["peak_memory"]),
        }
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the last figures on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
