"""What bench_gpu.py found, for reading: short enough for the end of a log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_goals import FASTER, LEVELS, Row, Rows, goals, matching

from qkern.text_table import format_table

__all__ = ["goals", "report"]

SHORT = {
    "torch bf16": "cuBLAS",
    "bitsandbytes gemm_4bit": "bnb",
    "bitsandbytes dequantize + linear": "bnb 2 steps",
    "Unsloth sequence": "Unsloth",
    "qkern dequantize + torch": "own 2 steps",
}


def report(content: dict[str, Any]) -> str:
    """Every stage's table, what is missing and why, the goals last."""
    rows: Rows = content["rows"]
    tables = (ceilings, checks, decode, products, layers, model, codec)
    parts = [text for table in tables if (text := table(rows))]
    parts += missing(content)
    if content.get("quick"):
        parts.append("tiny cases, to see that all runs: no time here means anything")
    else:
        parts.append(goals_table(content.get("goals") or goals(rows)))
    return "\n\n".join(parts)


def ceilings(rows: Rows) -> str:
    """Bandwidth, products, launches."""
    cells = []
    for row in matching(rows, case="ceiling"):
        unit = next((key for key in ("GB/s", "TFLOP/s") if key in row), None)
        shown = f"{row[unit]:.4g} {unit}" if unit else f"{1e6 * row['median']:.3g} us"
        cells.append((row["engine"], shown))
    return format_table(cells, ("limit", "")) if cells else ""


def checks(rows: Rows) -> str:
    """The largest error of each operation and dtype, in units of its bound; what is wrong."""
    found: dict[tuple[str, str], Rows] = {}
    for row in matching(rows, case="check"):
        found.setdefault((row["op"], row["dtype"]), []).append(row)
    if not found:
        return ""
    cells = []
    for (op, dtype), each in found.items():
        wrong = [row for row in each if row.get("wrong")]
        worst = max(row["error"] / row["bound"] if row["bound"] else row["error"] for row in each)
        verdict = "right" if not wrong else f"WRONG {len(wrong)}: {_where(wrong[0])}"
        cells.append((op, dtype, str(len(each)), f"{worst:.3g}", verdict))
    return format_table(cells, ("checked", "dtype", "cases", "of bound", ""))


def _where(row: Row) -> str:
    keys = ("format", "M", "N", "K", "r", "error")
    return " ".join(f"{key}={row[key]}" for key in keys if key in row)


def decode(rows: Rows) -> str:
    """Each way in each kernel, against the table in memory."""
    cells = [
        (row["op"], str(row.get("M", "")), row["engine"], *_times(row), _ratio(row, "table"))
        for row in matching(rows, case="decode")
    ]
    return format_table(cells, ("decode", "M", "way", "us", "quartiles", "")) if cells else ""


def _times(row: Row) -> tuple[str, str]:
    low, high = (f"{1e6 * q:.4g}" for q in row["quartiles"])
    return f"{1e6 * row['median']:.4g}", f"{low}-{high}"


def _ratio(row: Row, base: str) -> str:
    key = f"times faster than {base}"
    return f"{row[key]:.2f}x {base}" if key in row else ""


def products(rows: Rows) -> str:
    """A line for each shape and M: qkern's time, then how many times slower the others are."""
    found: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in matching(rows, case="linear"):
        found.setdefault((row["N"], row["K"], row["M"]), {})[row["engine"]] = row
    if not found:
        return ""
    cells = []
    for (N, K, M), engines in sorted(found.items()):
        ours = engines["qkern"]
        share = f"{ours['share of floor']:.2f}" if "share of floor" in ours else ""
        others = (engines.get(name) for name in SHORT)
        ratios = ("" if row is None else f"{row[FASTER]:.2f}" for row in others)
        cells.append((f"{N}x{K}", str(M), f"{1e6 * ours['median']:.4g}", share, *ratios))
    head = ("qkern's time against", "M", "us", "of floor", *SHORT.values())
    return format_table(cells, head)


def layers(rows: Rows) -> str:
    """Layers with LoRA: times, and qkern against each."""
    cells = []
    for case in ("forward and backward", "forward with LoRA", "linear, calls"):
        for row in matching(rows, case=case):
            shape = f"{row['N']}x{row['K']}"
            ratio = f"{row[FASTER]:.2f}"
            cells.append((case, shape, str(row["M"]), row["engine"], *_times(row), ratio))
    head = ("case", "shape", "M", "engine", "us", "quartiles", "qkern x")
    return format_table(cells, head) if cells else ""


def model(rows: Rows) -> str:
    """Tokens a second and memory."""
    cells = []
    for row in matching(rows, case="training step"):
        memory = f"{row['peak, bytes'] / 2**30:.2f}" if row["peak, bytes"] else ""
        kept = "on" if row["checkpointing"] else "off"
        speed = f"{row['tokens/s']:.4g}"
        cells.append((kept, row["engine"], speed, memory, f"{row[FASTER]:.2f}"))
    head = ("checkpointing", "engine", "tokens/s", "peak GiB", "qkern x")
    return format_table(cells, head) if cells else ""


def codec(rows: Rows) -> str:
    """Bandwidth beside a copy's."""
    cells = []
    for case in ("quantize", "dequantize"):
        for row in matching(rows, case=case):
            share = f"{row['share of copy']:.2f}" if "share of copy" in row else ""
            cells.append((case, row["dtype"], row["engine"], f"{row['GB/s']:.4g}", share))
    return format_table(cells, ("codec", "dtype", "engine", "GB/s", "of copy")) if cells else ""


def missing(content: dict[str, Any]) -> Iterator[str]:
    """What did not run, and why."""
    reasons = sorted({(r["engine"], r["absent"]) for r in content["rows"] if "absent" in r})
    lines = [f"absent: {name}: {reason}" for name, reason in reasons]
    lines += [f"dropped: {name}: {reason}" for name, reason in content["dropped"].items()]
    for name, text in content["failed"].items():
        last = text.strip().splitlines()[-1] if text.strip() else "no reason given"
        lines.append(f"FAILED: {name}: {last[:300]}")
    if lines:
        yield "\n".join(lines)


def goals_table(judged: Rows) -> str:
    """For reading."""
    cells = [
        (
            row["goal"],
            "-" if row["measured"] is None else f"{row['measured']:.3g}",
            ("<= " if row["bound"] == "at most" else "") + f"{row['must']:g}",
            *(f"{row[level]:g}" if level in row else "" for level in LEVELS[1:]),
            row["verdict"],
        )
        for row in judged
    ]
    return format_table(cells, ("goal", "measured", *LEVELS, "reached"))
