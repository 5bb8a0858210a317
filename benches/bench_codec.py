"""Host quantize and dequantize beside bitsandbytes' CPU back end, and each SIMD body by itself.

python benches/bench_codec.py [--size 4096] [--repeats 15] [--save]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qkern
from qkern import _native, codec
from qkern.formats import QuantFormat
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

Engines = dict[str, Callable[[], object]]


def quantize_engines(w: torch.Tensor, *, double_quant: bool) -> Engines:
    """NF4, blocks of 64; qkern by its public call, and forced bodies on raw buffers."""
    engines: Engines = {
        "qkern": lambda: qkern.quantize(w, double_quant=double_quant),
        "bitsandbytes": lambda: bnb.quantize_4bit(
            w, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        ),
    }
    if double_quant:
        return engines
    bits = w.view(torch.int16).numpy().view(np.uint16) if w.dtype != torch.float32 else w.numpy()
    packed, absmax = np.empty(w.numel() // 2, np.uint8), np.empty(w.numel() // 64, np.float32)
    arguments = (bits.reshape(-1), str(w.dtype)[6:], codec.code_array("nf4"), 64, packed, absmax)

    def forced(body: str) -> Callable[[], object]:
        return lambda: _native.quantize_4bit(*arguments, simd=body)

    return engines | {f"qkern, {body} forced": forced(body) for body in _native.available_simd()}


def dequantize_engines(w: torch.Tensor) -> Engines:
    """NF4, blocks of 64, fp32 scales, to w's dtype: fresh output for all, reused for qkern."""
    q = qkern.quantize(w, double_quant=False)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    out = torch.empty_like(w)
    return {
        "qkern": lambda: qkern.dequantize(q),
        "qkern, out=": lambda: qkern.dequantize(q, out=out),
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
    }


def check(w: torch.Tensor) -> None:
    """Same bytes and values, before anything is timed."""
    q = qkern.quantize(w, QuantFormat("nf4", 64, double_quant=False))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    if not torch.equal(q.packed.reshape(-1), packed.reshape(-1)):
        msg = "packed bytes differ from bitsandbytes'"
        raise AssertionError(msg)
    if not torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state)):
        msg = "dequantized values differ from bitsandbytes'"
        raise AssertionError(msg)


def run(size: int, repeats: int, min_time: float = 0.05) -> list[dict[str, Any]]:
    """One row per case and engine."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        check(w)
        cases = {
            "quantize": quantize_engines(w, double_quant=False),
            "quantize, double-quantized": quantize_engines(w, double_quant=True),
            "dequantize": dequantize_engines(w),
        }
        for case, engines in cases.items():
            times = harness.interleaved(engines, repeats=repeats, min_time=min_time)
            base = times["bitsandbytes"]["median"]
            for engine, summary in times.items():
                rows.append(
                    {
                        "case": case,
                        "dtype": str(dtype).removeprefix("torch."),
                        "size": size,
                        "engine": engine,
                        "times faster than bitsandbytes": base / summary["median"],
                        **summary,
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading: milliseconds and ratios."""
    headers = ("case", "dtype", "engine", "median ms", "quartiles ms", "x bitsandbytes")
    cells = [
        (
            row["case"],
            row["dtype"],
            row["engine"],
            f"{row['median'] * 1e3:.2f}",
            "{:.2f}-{:.2f}".format(*(1e3 * q for q in row["quartiles"])),
            f"{row['times faster than bitsandbytes']:.1f}",
        )
        for row in rows
    ]
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/codec.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write benches/results/codec.json")
    options = parser.parse_args()
    rows = run(options.size, options.repeats)
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save('codec', rows)}")


if __name__ == "__main__":
    main()
