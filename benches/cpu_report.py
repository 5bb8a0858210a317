"""What bench_cpu.py found, for reading: a table, the goals, and the ladder as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkern.text_table import format_table

Row = dict[str, Any]
Rows = list[Row]


def matching(rows: Iterable[Row], **fields: Any) -> Rows:
    """The measured rows that say all of this."""
    found = (row for row in rows if "absent" not in row)
    return [row for row in found if all(row.get(key) == value for key, value in fields.items())]


def value(rows: Rows, key: str, **fields: Any) -> float | None:
    """``key`` of the one row that matches."""
    found = [row[key] for row in matching(rows, **fields) if key in row]
    return found[0] if found else None


def fastest(rows: Rows, prefix: str, **fields: Any) -> float | None:
    """Least median of the engines whose names start so."""
    found = [r["median"] for r in matching(rows, **fields) if r["engine"].startswith(prefix)]
    return min(found, default=None)


def quotient(above: float | None, below: float | None) -> float | None:
    """None if either is."""
    return None if above is None or below is None else above / below


@dataclass(frozen=True)
class Goal:
    """What is asked of a measured ratio."""

    case: str
    must: float
    aim: float
    find: Callable[[Rows], float | None]
    at_most: bool = False

    def judge(self, found: float) -> str:
        """aim, must, or how far below."""
        sign = -1 if self.at_most else 1
        if sign * found >= sign * self.aim:
            return "aim"
        return "must" if sign * found >= sign * self.must else "below"


def _codec_goals() -> list[Goal]:
    goals = []
    square, tall = {"N": 4096, "K": 4096}, {"N": 14336, "K": 4096}
    wanted = [(square, "fp32", 0.70, 0.90), (square, "bf16", 0.62, 0.85)]
    wanted += [(tall, "fp32", 0.62, 0.90), (tall, "bf16", 0.58, 0.85)]
    for size, dtype, must, aim in wanted:
        about = {"case": "quantize", "dtype": dtype, **size}
        name = f"quantize NF4+DQ {size['N']}x{size['K']} {dtype}, share of read"
        goals.append(Goal(name, must, aim, _value("share of read", engine="qkern", **about)))
    times = "times faster than bitsandbytes"
    compared = [("fp32", "qkern", 85, 110), ("bf16", "qkern", 160, 220)]
    compared += [("fp32", "qkern, avx2 forced", 45, 70)]
    for dtype, engine, must, aim in compared:
        about = {"case": "quantize", "dtype": dtype, "engine": engine, **square}
        find = _value(times, **about)
        goals.append(Goal(f"quantize {dtype}, {engine}, {times}", must, aim, find))
    base = {"case": "quantize", "dtype": "fp32", **square}
    int8 = _value("share of read", engine="qkern, int8", **base)
    goals += [
        Goal("search, time against absmax", 6, 3, lambda rows: _search(rows, base), at_most=True),
        Goal("quantize int8 fp32, share of read", 0.70, 0.90, int8),
    ]
    for dtype in ("fp32", "bf16"):
        about = {"case": "dequantize", "dtype": dtype, **square}
        share = _value("share of NT write", engine="qkern, reused output", **about)
        fresh = _value(times, engine="qkern, fresh output", **about)
        goals.append(Goal(f"dequantize {dtype}, reused, share of NT write", 0.90, 0.97, share))
        goals.append(Goal(f"dequantize {dtype}, fresh, {times}", 2.5, 3, fresh))
    return goals


def _search(rows: Rows, base: Row) -> float | None:
    slow = value(rows, "median", engine="qkern, search", **base)
    return quotient(slow, value(rows, "median", engine="qkern", **base))


def _value(key: str, **fields: Any) -> Callable[[Rows], float | None]:
    return lambda rows: value(rows, key, **fields)


def _linear_goals() -> list[Goal]:
    about = {"case": "linear", "N": 4096, "K": 4096}
    bf16, int8 = {**about, "dtype": "bf16"}, "qkern, int8 compute"
    times = "times faster than torch bf16"

    def against(prefix: str, ours: str, M: int) -> Callable[[Rows], float | None]:
        return lambda rows: quotient(
            fastest(rows, prefix, M=M, **bf16), fastest(rows, ours, M=M, **bf16)
        )

    exact = _value("share of read", engine="qkern", M=1, dtype="fp32", **about)
    goals = [
        Goal("linear M=1 fp32, share of read", 0.75, 0.9, exact),
        Goal(
            "linear M=1 int8, share of read",
            *(0.80, 0.95, _value("share of read", engine=int8, M=1, **bf16)),
        ),
        Goal(f"linear M=1 int8, {times}", 4.5, 5.5, _value(times, engine=int8, M=1, **bf16)),
        Goal("linear M=1, times faster than ggml's best", 1, 1.2, against("ggml", "qkern", 1)),
    ]
    wanted = [("qkern", 8, 1.7, 2.5), ("qkern", 32, 1.4, 2.0), ("qkern", 512, 1.0, 1.2)]
    wanted += [(int8, 8, 2.0, 4.0), (int8, 32, 1.8, 3.0), (int8, 512, 1.4, 1.8)]
    for engine, M, must, aim in wanted:
        find = _value(times, engine=engine, M=M, **bf16)
        goals.append(Goal(f"linear M={M}, {engine}, {times}", must, aim, find))
    onednn = against("oneDNN int8", int8, 512)
    return [*goals, Goal("linear M=512, int8, times faster than oneDNN int8", 0.8, 1.05, onednn)]


def _other_goals() -> list[Goal]:
    times = "times faster than torch bf16"
    train = _value(times, case="forward and backward with LoRA", engine="qkern", M=512)
    model = [
        Goal(f"{case}, {engine}, {times}", must, aim, _value(times, case=case, engine=engine))
        for case, must, aim in (("decode", 2.5, 3.5), ("training step", 0.95, 1.1))
        for engine in ("qkern", "qkern, int8 compute")
    ]
    lora = {"case": "LoRA on top", "engine": "qkern with LoRA"}
    return [
        Goal(f"M=512 forward, dX, adapter's gradients, {times}", 0.95, 1.15, train),
        Goal(
            *("LoRA on top M=1, extra time", 0.10, 0.05, _value("extra time", M=1, **lora)),
            at_most=True,
        ),
        Goal(
            *("LoRA on top M=512, extra time", 0.05, 0.03, _value("extra time", M=512, **lora)),
            at_most=True,
        ),
        Goal("two threads, least of large cases", 1.8, 1.95, lambda r: _threads(r, small=False)),
        Goal("two threads, least of small shapes", 1.0, 1.0, lambda r: _threads(r, small=True)),
        *model,
    ]


def _threads(rows: Rows, *, small: bool) -> float | None:
    found = [
        row["times faster than one thread"]
        for row in matching(rows, case="threads", threads=2)
        if ("small" in row["group"]) == small
        if not row["engine"].startswith(("torch", "limit"))
    ]
    return min(found, default=None)


def goals(rows: Rows) -> Rows:
    """Each goal with what was measured; None where a case or its peer is missing."""
    found = []
    for goal in (*_codec_goals(), *_linear_goals(), *_other_goals()):
        measured = goal.find(rows)
        verdict = "not measured" if measured is None else goal.judge(measured)
        bound = "at most" if goal.at_most else "at least"
        fields = {"goal": goal.case, "measured": measured, "bound": bound}
        found.append({**fields, "must": goal.must, "aim": goal.aim, "verdict": verdict})
    return found


def goals_table(judged: Rows) -> str:
    """For reading."""
    cells = [
        (
            row["goal"],
            "-" if row["measured"] is None else f"{row['measured']:.3g}",
            f"{'<= ' if row['bound'] == 'at most' else ''}{row['must']:g}",
            f"{row['aim']:g}",
            row["verdict"],
        )
        for row in judged
    ]
    return format_table(cells, ("goal", "measured", "must", "aim", "reached"))


NOTES = (
    "share of read",
    "share of NT write",
    "share of reading codes and NT write",
    "share of tiles",
    "times faster than torch bf16",
    "times faster than bitsandbytes",
    "times faster than one thread",
    "times faster than one thread, minima",
    "extra time",
    "GB/s",
    "tokens/s",
    "error",
    "CPU time of all threads",
)
ABBREVIATED = {"times faster than": "x", "share of": "/", "error": "err", "extra time": "extra"}


def table(rows: Rows) -> str:
    """Every row, then what is absent and why."""
    cells = []
    for row in rows:
        if "absent" in row:
            continue
        shape = f"{row['N']}x{row['K']}" if "N" in row else ""
        kind = " ".join(str(row[k]) for k in ("case", "dtype") if k in row)
        M = f"M={row['M']}" if "M" in row else f"{row['threads']} thr." if "threads" in row else ""
        time = row["minimum" if row["clock"] == "wall" else "median"]
        spread = "{:.4g}-{:.4g}".format(*(1e3 * q for q in row["quartiles"]))
        notes = ", ".join(f"{_short(k)} {row[k]:.3g}" for k in NOTES if k in row)
        cells.append((kind, shape, M, row["engine"], f"{1e3 * time:.4g}", spread, notes))
    text = format_table(cells, ("case", "shape", "", "engine", "ms", "quartiles", "notes"))
    reasons = sorted({(row["engine"], row["absent"]) for row in rows if "absent" in row})
    return "\n".join([text, *(f"absent: {name}: {reason}" for name, reason in reasons)])


def _short(key: str) -> str:
    for long, short in ABBREVIATED.items():
        key = key.replace(long, short)
    return key


# The lines of the picture; of ggml's kinds its fastest, and the one whose table is like NF4's.
SHOWN = ("qkern", "qkern, int8 compute", "bitsandbytes eval", "bitsandbytes train", "torchao int4")
SHOWN += ("torchao int4, compiled",)
SHOWN += ("torchao int8, int8 activations", "oneDNN int8", "optimum-quanto qint8", "HQQ")
SHOWN += ("ggml Q4_0 AMX", "ggml IQ4_NL CPU_REPACK")


def plot(rows: Rows, path: Path) -> Path:
    """Times faster than the unquantized bf16 layer over M, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = [row for row in matching(rows, case="linear", dtype="bf16") if "M" in row]
    sizes = [(row["N"], row["K"]) for row in found]
    size = max(set(sizes), key=sizes.count)
    key = "times faster than torch bf16"
    with mpl.rc_context({"svg.hashsalt": "qkern", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(8, 5))
        for drawn, name in enumerate(SHOWN):
            line = [r for r in found if r["engine"] == name and (r["N"], r["K"]) == size]
            points = sorted((row["M"], row[key]) for row in line if key in row)
            if points:
                own = name.startswith("qkern")
                style: Row = {"linewidth": 2.5 if own else 1.2, "marker": "o" if own else "."}
                style |= {"color": f"C{drawn % 10}", "linestyle": "-" if drawn < 10 else "--"}
                axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.axhline(1.0, color="black", linewidth=1, label="torch bf16, unquantized")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("M, rows of x")
        axes.set_ylabel("times faster than the unquantized bf16 layer")
        axes.set_title(f"y = x Wᵀ, {size[0]}x{size[1]}, one thread, weights out of cache")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return path
