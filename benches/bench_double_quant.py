"""What 8-bit scales do to small rows among ordinary ones, beside other packages.

Every second row of a Gaussian weight is scaled by 1e-3. Scales that are coded relative to their
mean cannot hold those rows; qkern notices and keeps fp32 scales for such a tensor.

python benches/bench_double_quant.py [--sizes 256 1024] [--save]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkern
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

SMALL = 1e-3

# A weight to its decoded values and the parts that hold it.
Engine = Callable[[Tensor], tuple[Tensor, Iterable[Tensor | None]]]


def with_qkern(
    w: Tensor, *, double_quant: bool, method: str = "absmax"
) -> tuple[Tensor, Iterable[Tensor | None]]:
    """NF4, blocks of 64; double quantization as far as it is safe."""
    q = qkern.quantize(w, "nf4", blocksize=64, double_quant=double_quant, method=method)
    return q.dequantize(), q.parts


def with_bitsandbytes(w: Tensor, *, nested: bool) -> tuple[Tensor, Iterable[Tensor | None]]:
    """NF4, blocks of 64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    second_level = (state.state2.absmax, state.offset) if nested else ()
    return bnb.dequantize_4bit(packed, state), (packed, state.absmax, *second_level)


def with_torchao(w: Tensor) -> tuple[Tensor, Iterable[Tensor | None]]:
    """NF4Tensor: blocks of 64, their scales in 8 bits by groups of 256."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
        except ImportError:  # before 0.17
            from torchao.dtypes.nf4tensor import to_nf4
    q = to_nf4(w, block_size=64, scaler_block_size=256)
    scales = (q.quantized_scalers, q.quantization_factor, q.scaler_mean)
    return q.get_original_weight(), (q.quantized_data, *scales)


def with_hqq(w: Tensor) -> tuple[Tensor, Iterable[Tensor | None]]:
    """4 bits, groups of 64 along a row, an fp32 scale and an fp32 zero each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hqq.core.quantize import Quantizer
    q, meta = Quantizer.quantize(w, nbits=4, group_size=64, axis=1, device="cpu")
    return Quantizer.dequantize(q, meta), (q, meta["scale"], meta["zero"])


ENGINES: dict[str, Engine] = {
    "qkern": lambda w: with_qkern(w, double_quant=True),
    "qkern, fp32 scales": lambda w: with_qkern(w, double_quant=False),
    "qkern, search": lambda w: with_qkern(w, double_quant=True, method="search"),
    "bitsandbytes, nested": lambda w: with_bitsandbytes(w, nested=True),
    "bitsandbytes, fp32 scales": lambda w: with_bitsandbytes(w, nested=False),
    "torchao NF4Tensor": with_torchao,
    "HQQ": with_hqq,
}


def relative_rms(decoded: Tensor, w: Tensor) -> float:
    """``|decoded - w| / |w|``."""
    return float((decoded.double() - w.double()).norm() / w.double().norm())


def measure(engine: Engine, size: int) -> dict[str, float]:
    """Errors of a weight of ``size`` squared, by kind of row."""
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    w[::2] *= SMALL
    decoded, parts = engine(w)
    small, ordinary = slice(0, None, 2), slice(1, None, 2)
    flipped = decoded[small].sign() * w[small].sign() < 0
    return {
        "relative RMS error, small rows": relative_rms(decoded[small], w[small]),
        "relative RMS error, other rows": relative_rms(decoded[ordinary], w[ordinary]),
        "signs flipped, small rows": float(flipped.double().mean()),
        "bits per weight": 8 * sum(part.nbytes for part in parts if part is not None) / w.numel(),
    }


def run(sizes: Iterable[int]) -> list[dict[str, Any]]:
    """One row per size and engine; a package that is not installed is left out, and named."""
    engines = {name: engine for name, engine in ENGINES.items() if installed(name, engine)}
    return [
        {"engine": name, "size": size, **measure(engine, size)}
        for size in sizes
        for name, engine in engines.items()
    ]


def installed(name: str, engine: Engine) -> bool:
    """Whether an engine's package is there; says so if it is not."""
    try:
        engine(torch.ones(256, 256))
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    headers = ("size", "engine", "error, small rows", "other rows", "signs flipped", "bits")
    cells = [
        (
            f"{row['size']}x{row['size']}",
            row["engine"],
            f"{row['relative RMS error, small rows']:.4f}",
            f"{row['relative RMS error, other rows']:.4f}",
            f"{100 * row['signs flipped, small rows']:.1f} %",
            f"{row['bits per weight']:.3f}",
        )
        for row in rows
    ]
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/double_quant.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--save", action="store_true", help="write results/double_quant.json")
    options = parser.parse_args()
    rows = run(options.sizes)
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save('double_quant', rows)}")


if __name__ == "__main__":
    main()
