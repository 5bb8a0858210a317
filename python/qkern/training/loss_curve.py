"""The loss over the steps of a run, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING = 0.8  # weight of the past in the smooth line


def write_loss_curve(
    history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = ""
) -> Path:
    """Draws the loss, and its smoothed form once there are enough points to need one.

    Args:
        history: log entries; those with ``step`` and ``loss`` are drawn.
        path: the PNG file.
        title: above the picture.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    many = len(points) > 20
    axes.plot(steps, losses, color="#9db4d0" if many else "#1f4e8c", linewidth=1, label="per step")
    if many:
        axes.plot(steps, smooth(losses), color="#1f4e8c", linewidth=2, label="smoothed")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return Path(path)


def smooth(values: Sequence[float], *, weight: float = _SMOOTHING) -> list[float]:
    """Exponential mean, corrected for its start."""
    result, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(mean / norm)
    return result
