"""Pictures of an inspection: the error of every layer, and how the weights are distributed.

matplotlib draws them, without a display and without pyplot's state. PNG or SVG by the suffix of
the file; text in an SVG stays text.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qkern.checkpoint.chart_labels import kind_of, label_of, layer_number, short_names
from qkern.checkpoint.inspection_report import InspectionReport
from qkern.checkpoint.inspection_text import format_text
from qkern.checkpoint.tensor_report import TensorReport
from qkern.errors import FormatError, MissingDependencyError
from qkern.files import replacing
from qkern.formats import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".svg")
# Up to here every tensor has a bar with its name; more of them are points over the layer's number.
_MOST_BARS: Final = 30
_LABELLED: Final = 6  # worst points that are named
_AXIS: Final = "relative RMS error, ||w - w'|| / ||w||"
_NO_NUMBER: Final = "no layer number"
_COLOURS: Final = (
    "#1f4e8c",
    "#d1662a",
    "#2e8b57",
    "#b0305c",
    "#7a5bb5",
    "#8c6d1f",
    "#2aa1b3",
    "#777777",
)
_MARKERS: Final = ("o", "^", "s")


def check_chart_path(path: str | Path) -> Path:
    """The path, if a chart can be written there: asked before the work, not after it.

    Raises:
        FormatError: for a suffix that is not .png or .svg.
        IsADirectoryError: if it is a directory.
        MissingDependencyError: if matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        msg = f"{path}: a chart is written as {' or '.join(SUFFIXES)}, by its suffix"
        raise FormatError(msg)
    if path.is_dir():
        msg = f"{path} is a directory: a file is needed"
        raise IsADirectoryError(msg)
    if importlib.util.find_spec("matplotlib") is None:
        msg = 'charts need matplotlib, not installed here: pip install "qkern[inspect]"'
        raise MissingDependencyError(msg)
    return path


def write_error_chart(report: InspectionReport, path: str | Path) -> Path:
    """Draw the relative RMS error of each tensor.

    Few tensors are bars with their names. Many are points over the number of their layer, coloured
    by kind (q_proj, ...), the worst ones named.

    Args:
        report: with errors: of a dense checkpoint, or of a comparison.
        path: .png or .svg; replaced if it is there.

    Raises:
        FormatError: if the report has no errors, or for another suffix.
        MissingDependencyError: if matplotlib is not installed.
    """
    path = check_chart_path(path)
    rows = [row for row in report.tensors if row.error is not None]
    if not rows:
        msg = (
            f"{report.path}: nothing to draw, no tensor has an error; a quantized checkpoint has "
            "errors only in comparison with another one"
        )
        raise FormatError(msg)
    if report.comparison is not None:
        title = f"{_title(report.path)} against {_title(report.comparison.path)}"
    else:
        title = f"{_title(report.path)}{_trial(report)}"
    differing = [row for row in rows if _error_of(row) > 0]
    if differing and len(differing) < len(rows):
        title += f" ({len(rows) - len(differing)} equal tensors not shown)"
        rows = differing
    if len(rows) <= _MOST_BARS:
        figure, axes = _figure(8.0, 1.6 + 0.26 * len(rows))
        _draw_bars(axes, rows)
    else:
        figure, axes = _figure(10.0, 5.4)
        _draw_layers(axes, rows)
    figure.suptitle(f"Error per layer: {title}", fontsize=11)
    return _save(figure, path)


def write_histogram(report: InspectionReport, path: str | Path) -> Path:
    """Draw how the weights are distributed, in units of their tensor's RMS, and the codes' use.

    Args:
        report: made with ``histogram=True``.
        path: .png or .svg; replaced if it is there.

    Raises:
        FormatError: if the report has no histogram or an empty one, or for another suffix.
        MissingDependencyError: if matplotlib is not installed.
    """
    path = check_chart_path(path)
    if report.histogram is None:
        msg = "the report has no histogram: inspect with histogram=True"
        raise FormatError(msg)
    if not any(report.histogram):
        msg = f"{report.path}: nothing to draw, no tensor counts as a linear layer's weight"
        raise FormatError(msg)
    usage = _code_usage(report)
    figure, axes = _figure(10.0 if usage else 6.4, 4.2, columns=2 if usage else 1)
    _draw_weights(axes if usage is None else axes[0], report)
    if usage is not None:
        _draw_codes(axes[1], *usage)
    codes = f", codes{_trial(report)}" if usage and report.format else ""
    figure.suptitle(f"Weights of {_title(report.path)}{codes}", fontsize=11)
    return _save(figure, path)


def _draw_bars(axes: Axes, rows: Sequence[TensorReport]) -> None:
    errors = [_error_of(row) for row in rows]
    finite = [error for error in errors if math.isfinite(error)]
    longest = max(finite, default=0.0) or 1.0
    shown = [error if math.isfinite(error) else longest for error in errors]
    worst = errors.index(max(errors))
    places = range(len(rows))
    colours = ["#d1662a" if i == worst and errors[i] > 0 else "#9db4d0" for i in places]
    axes.barh(places, shown, color=colours, height=0.7)
    for i, error in enumerate(errors):
        text = f" {error:.4g}" if math.isfinite(error) else " not finite"
        axes.text(shown[i], i, text, va="center", fontsize=8)
    axes.set_yticks(places, [label_of(row.name) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * longest)
    axes.set_xlabel(_AXIS)


def _draw_layers(axes: Axes, rows: Sequence[TensorReport]) -> None:
    """Points over the layer's number, a line for each kind; the worst are numbered and named."""
    places = _places([row.name for row in rows])
    kinds: dict[str, list[tuple[float, float]]] = {}
    points = []
    for row, (kind, x) in zip(rows, places, strict=True):
        error = _error_of(row)
        if math.isfinite(error):
            kinds.setdefault(kind, []).append((x, error))
            points.append((error, x, label_of(row.name)))
    names = short_names([kind for kind in kinds if kind != _NO_NUMBER])
    styles = [(marker, colour) for marker in _MARKERS for colour in _COLOURS]
    for i, (kind, found) in enumerate(kinds.items()):
        marker, colour = styles[i % len(styles)]
        xs, ys = zip(*sorted(found), strict=True)
        line = "-" if kind != _NO_NUMBER and len(set(xs)) == len(xs) else ""
        style: dict[str, Any] = {
            "markersize": 4,
            "linewidth": 0.8,
            "alpha": 0.85,
            "linestyle": line,
        }
        label = label_of(names.get(kind, kind)) if i < len(styles) else "_"
        axes.plot(xs, ys, marker=marker, color=colour, label=label, **style)
    heights = sorted(error for error, _, _ in points)
    if heights and heights[0] > 0 and heights[-1] > 20 * heights[len(heights) // 2]:
        axes.set_yscale("log")
    axes.set(xlabel="layer", ylabel=_AXIS)
    _set_ticks(axes, [(kind, x) for kind, x in places])
    if len(kinds) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    _name_worst(axes, points)


def _places(names: Sequence[str]) -> list[tuple[str, float]]:
    """Kind and horizontal place of each name: its layer's number, or right of the last layer."""
    numbers = [layer_number(name) for name in names]
    known = [number for number in numbers if number is not None]
    if len(set(known)) < 2:  # no layers to speak of: in the order of their names
        return [(_NO_NUMBER, float(i)) for i in range(len(names))]
    beyond = max(known) + max(1.0, round(max(known) / 20))
    return [
        (_NO_NUMBER, beyond) if number is None else (kind_of(name), float(number))
        for name, number in zip(names, numbers, strict=True)
    ]


def _set_ticks(axes: Axes, places: Sequence[tuple[str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = [x for kind, x in places if kind != _NO_NUMBER]
    if not layers:
        axes.set_xlabel("tensor, in the order of names")
        return
    steps = MaxNLocator(integer=True).tick_values(min(layers), max(layers))
    ticks = [tick for tick in steps if min(layers) <= tick <= max(layers)]
    labels = [f"{tick:.0f}" for tick in ticks]
    beyond = max(x for _, x in places)
    if beyond > max(layers):
        ticks, labels = [*ticks, beyond], [*labels, "none"]
    axes.set_xticks(ticks, labels)


def _name_worst(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Numbers at the highest points, and their names below, where none can hide another."""
    worst = sorted(points, key=lambda point: -point[0])[:_LABELLED]
    lines = []
    for i, (error, x, name) in enumerate(worst, 1):
        axes.annotate(
            str(i), (x, error), xytext=(5, 3), textcoords="offset points", fontsize=8, weight="bold"
        )
        lines.append(f"{i}  {name}  {error:.4g}")
    blank = [axes.plot([], [], linestyle="")[0] for _ in lines]
    axes.figure.legend(
        blank, lines, loc="outside lower center", ncols=2, frameon=False, fontsize=8, handlelength=0
    )


def _draw_weights(axes: Axes, report: InspectionReport) -> None:
    below, *counts, above = report.histogram or (0, 0)
    edges = np.array(report.histogram_edges)
    total = below + above + sum(counts)
    axes.stairs(counts, edges, fill=True, color="#9db4d0", label="weights")
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    expected = total * density * np.diff(edges)
    seen = expected > 0.5
    axes.plot(middles[seen], expected[seen], color="#1f4e8c", linewidth=1, label="normal")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set(xlabel="weight / RMS of its tensor", ylabel=f"weights per {edges[1] - edges[0]:.2g}")
    axes.set_title(f"{total:,} weights, {below + above:,} outside of the axis", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _draw_codes(axes: Axes, quant_type: str, counts: Sequence[int]) -> None:
    share, kind = 100 * np.array(counts) / max(sum(counts), 1), KINDS[quant_type]
    unit = "row's" if kind.per_row else "block's"
    axes.set(ylabel="share of the weights (%)")
    if kind.code is None:
        axes.stairs(share, np.arange(-128.5, 128), fill=True, color="#9db4d0")
        axes.set(xlabel=f"code, in units of its {unit} scale / 127")
        axes.set_title(f"use of the {quant_type} codes, -127 to 127", fontsize=9)
        return
    order = np.argsort(np.array(kind.code), kind="stable")
    axes.bar(range(16), share[order], color="#9db4d0", width=0.8)
    axes.set_xticks(range(16), [f"{kind.code[i]:.3f}" for i in order], rotation=90, fontsize=7)
    axes.set(xlabel=f"code, in units of its {unit} scale")
    axes.set_title(f"use of the 16 {quant_type} codes (even would be 6.25 %)", fontsize=9)
    axes.axhline(6.25, color="#1f4e8c", linewidth=0.8, linestyle=":")


def _code_usage(report: InspectionReport) -> tuple[str, list[int]] | None:
    """The format that holds the most weights, and how often it uses each code."""
    totals: dict[str, list[int]] = {}
    for row in report.tensors:
        if row.format is not None and row.scales is not None:
            counts = row.scales.code_counts
            total = totals.setdefault(row.format.quant_type, [0] * len(counts))
            for i, count in enumerate(counts):
                total[i] += count
    return max(totals.items(), key=lambda item: sum(item[1]), default=None)


def _trial(report: InspectionReport) -> str:
    return f" as {format_text(report.format)}, method {report.method}" if report.format else ""


def _error_of(row: TensorReport) -> float:
    return math.inf if row.error is None else row.error.relative_rms


def _title(path: Path) -> str:
    return label_of(path.resolve().name)


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, columns)
    for each in figure.axes:
        each.grid(alpha=0.25)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib as mpl

    kind = path.suffix.lower().removeprefix(".")
    # The same picture is the same bytes: no date, and names that do not change.
    metadata = {"Date": None} if kind == "svg" else {}
    with (
        warnings.catch_warnings(),
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qkern"}),
        replacing(path) as temporary,
    ):
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format=kind, metadata=metadata)
    return path
