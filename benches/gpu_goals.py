"""What is asked of the measured ratios: must, strong, moonshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = list[Row]

CUBLAS, GEMM, SEQUENCE = "torch bf16", "bitsandbytes gemm_4bit", "Unsloth sequence"
PEFT, FROZEN = "PEFT + bitsandbytes", "torch bf16, frozen, no LoRA"
WORKSPACE = "qkern dequantize + torch"
FASTER = "qkern is times faster"
LEVELS = ("must", "strong", "moonshot")


def matching(rows: Iterable[Row], **fields: Any) -> Rows:
    """The measured rows that say all of this."""
    found = (row for row in rows if "absent" not in row)
    return [row for row in found if all(row.get(key) == value for key, value in fields.items())]


def value(key: str, **fields: Any) -> Callable[[Rows], float | None]:
    """``key`` of the first row that matches."""

    def find(rows: Rows) -> float | None:
        found = [row[key] for row in matching(rows, **fields) if key in row]
        return found[0] if found else None

    return find


@dataclass(frozen=True)
class Goal:
    """What is asked of a measured ratio.

    Attributes:
        case: in words.
        levels: must, strong, moonshot; fewer where no more is asked.
        find: the ratio, None where it was not measured.
        at_most: smaller is better.
    """

    case: str
    levels: tuple[float, ...]
    find: Callable[[Rows], float | None]
    at_most: bool = False

    def judge(self, found: float) -> str:
        """The highest level that is reached, or "below"."""
        sign = -1 if self.at_most else 1
        reached = [
            name
            for name, level in zip(LEVELS, self.levels, strict=False)
            if sign * found >= sign * level
        ]
        return reached[-1] if reached else "below"


def _product(M: int, shape: tuple[int, int], engine: str) -> Callable[[Rows], float | None]:
    return value(FASTER, case="linear", M=M, N=shape[0], K=shape[1], engine=engine)


def _against_bitsandbytes(rows: Rows) -> list[float]:
    """At every shape and number of tokens, beside the faster of its two ways."""
    cells: dict[tuple[int, ...], list[float]] = {}
    for row in matching(rows, case="linear"):
        if row["engine"].startswith("bitsandbytes") and FASTER in row:
            cells.setdefault((row["M"], row["N"], row["K"]), []).append(row[FASTER])
    return [min(found) for found in cells.values()]


def _least(rows: Rows) -> float | None:
    return min(_against_bitsandbytes(rows), default=None)


def _mean(rows: Rows) -> float | None:
    found = _against_bitsandbytes(rows)
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def _large_products() -> list[Goal]:
    wide, square = (14336, 4096), (4096, 4096)
    wanted = [
        (1, wide, CUBLAS, (2.0, 2.5, 3.0)),
        (8, wide, CUBLAS, (1.7, 2.4, 3.0)),
        (8, square, GEMM, (3.0, 4.5, 6.0)),
        (16, wide, CUBLAS, (1.5, 2.2, 2.8)),
        (64, wide, CUBLAS, (1.2, 1.7, 2.3)),
        (512, wide, WORKSPACE, (1.0, 1.15, 1.3)),
    ]
    return [
        Goal(f"M={M}, {N}x{K}, times faster than {engine}", levels, _product(M, (N, K), engine))
        for M, (N, K), engine, levels in wanted
    ] + [
        Goal("every M and shape, least of times faster than bitsandbytes", (1.0,), _least),
        Goal("every M and shape, mean of times faster than bitsandbytes", (1.0, 1.3), _mean),
    ]


def _training() -> list[Goal]:
    layer = {"case": "forward and backward", "M": 4096, "N": 14336, "K": 4096}
    frozen = value("time against frozen", engine="qkern", **layer)
    model = {"case": "training step", "checkpointing": True, "engine": PEFT}
    return [
        Goal("layer + LoRA M=4096, time against frozen bf16", (1.15, 1.08, 1.05), frozen, True),
        Goal(
            "layer + LoRA M=4096, times faster than Unsloth's sequence",
            (1.1, 1.2, 1.3),
            value(FASTER, engine=SEQUENCE, **layer),
        ),
        Goal(
            f"layer + LoRA M=4096, times faster than {PEFT}",
            (1.5, 2.0),
            value(FASTER, engine=PEFT, **layer),
        ),
        Goal(f"8 blocks, times the tokens/s of {PEFT}", (1.4, 2.0), value(FASTER, **model)),
        Goal(
            f"8 blocks, peak memory against {PEFT}",
            (1.0, 0.95, 0.9),
            value("qkern's share of peak", **model),
            at_most=True,
        ),
    ]


def _codec() -> list[Goal]:
    wanted = {"dequantize": (0.8, 0.9, 0.95), "quantize": (0.6, 0.8, 0.9)}
    return [
        Goal(
            f"{op} NF4 and 8-bit scales, bf16, share of copy",
            levels,
            value("share of copy", case=op, dtype="bf16", engine="qkern"),
        )
        for op, levels in wanted.items()
    ]


def goals(rows: Rows) -> Rows:
    """Each goal with what was measured; None where a case or its peer is missing."""
    found = []
    for goal in (*_large_products(), *_training(), *_codec()):
        measured = goal.find(rows)
        verdict = "not measured" if measured is None else goal.judge(measured)
        bound = "at most" if goal.at_most else "at least"
        levels = dict(zip(LEVELS, goal.levels, strict=False))
        about = {"goal": goal.case, "measured": measured, "bound": bound}
        found.append({**about, **levels, "verdict": verdict})
    return found
