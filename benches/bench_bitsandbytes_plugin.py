"""bitsandbytes' own calls on the CPU, by itself and with the plug-in: interleaved in one process.

python benches/bench_bitsandbytes_plugin.py [--size 4096] [--repeats 5] [--save]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qkern.integrations import bitsandbytes as plugin
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnbf

Call = Callable[[], object]
DTYPE = torch.bfloat16
TOKENS = (1, 32, 512)
# Relative RMS: both multiply NF4; bitsandbytes' layers round scales to bf16 in eval mode.
LARGEST_DIFFERENCE = 0.01


def layer(size: int) -> torch.nn.Module:
    """``Linear4bit`` of bf16, NF4 in blocks of 64 with nested scales, not yet called."""
    torch.manual_seed(0)
    options = {"bias": False, "compute_dtype": DTYPE, "quant_type": "nf4"}
    linear = bnb.nn.Linear4bit(size, size, **options)
    linear.weight.data = linear.weight.data.to(DTYPE)
    return linear.to("cpu")


def cases(size: int) -> dict[str, tuple[Call, Call]]:
    """What is timed: the same call for bitsandbytes and for the plug-in.

    Layers are two of each: in eval mode bitsandbytes repacks its own at the first call.
    """
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    calls: dict[str, tuple[Call, Call]] = {}
    for dtype in (torch.float32, DTYPE):
        values, name = w.to(dtype), str(dtype).removeprefix("torch.")
        packed, state = bnbf.quantize_4bit(values, quant_type="nf4")
        calls[f"quantize_4bit {name}"] = _same(
            lambda values=values: bnbf.quantize_4bit(values, quant_type="nf4")[0]
        )
        calls[f"dequantize_4bit {name}"] = _same(
            lambda packed=packed, state=state: bnbf.dequantize_4bit(packed, state)
        )
    for mode in ("eval", "train"):
        theirs, ours = (layer(size).train(mode == "train") for _ in range(2))
        for tokens in TOKENS:
            x = torch.randn(tokens, size, dtype=DTYPE)
            name = f"Linear4bit, {mode}, M={tokens}"
            calls[name] = (_forward(theirs, x), _forward(ours, x))
    x = torch.randn(512, size, dtype=DTYPE, requires_grad=True)
    linear = layer(size)
    calls["Linear4bit, forward and dX, M=512"] = _same(lambda: _step(linear, x))
    return calls


def _same(call: Call) -> tuple[Call, Call]:
    return call, call


def _forward(linear: torch.nn.Module, x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return linear(x)

    return call


def _step(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x.grad = None
    linear(x).sum().backward()
    return x.grad


def engines(own: Call, plugged: Call) -> dict[str, Call]:
    """The two, each switching to its own side first: a millisecond, once in ``min_time``."""

    def by_itself() -> object:
        plugin.disable()
        return own()

    def with_plugin() -> object:
        plugin.enable()
        return plugged()

    return {"bitsandbytes": by_itself, "with the plug-in": with_plugin}


def check(case: str, pair: dict[str, Call]) -> None:
    """Nearly equal results, before anything is timed; the bytes of quantize are equal."""
    theirs, ours = (pair[name]().double() for name in ("bitsandbytes", "with the plug-in"))
    difference = float((ours - theirs).norm() / theirs.norm())
    if difference > (0 if "quantize" in case else LARGEST_DIFFERENCE):
        msg = f"{case}: the results differ by {difference:.2g} of their norm"
        raise AssertionError(msg)


def run(size: int, repeats: int, min_time: float = 0.2) -> list[dict[str, Any]]:
    """One row per case and engine."""
    rows = []
    for case, calls in cases(size).items():
        pair = engines(*calls)
        check(case, pair)
        times = harness.interleaved(pair, repeats=repeats, min_time=min_time)
        base = times["bitsandbytes"]["median"]
        for engine, summary in times.items():
            ratio = base / summary["median"]
            settings = {"case": case, "size": size, "threads": torch.get_num_threads()}
            rows.append(settings | {"engine": engine, "times faster": ratio} | summary)
    plugin.disable()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading: milliseconds and ratios."""
    headers = ("case", "engine", "median ms", "quartiles ms", "x bitsandbytes")
    cells = [
        (
            row["case"],
            row["engine"],
            f"{row['median'] * 1e3:.2f}",
            "{:.2f}-{:.2f}".format(*(1e3 * q for q in row["quartiles"])),
            f"{row['times faster']:.2f}",
        )
        for row in rows
    ]
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/bitsandbytes_plugin.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write benches/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = run(options.size, options.repeats)
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save('bitsandbytes_plugin', rows)}")


if __name__ == "__main__":
    main()
