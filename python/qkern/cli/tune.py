"""``qkern tune``: time the kernels on this GPU, and keep the fastest config of each product."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

from qkern.cli import exit_codes
from qkern.cli.terminal import say
from qkern.text_table import format_table
from qkern.training.requirements import require

if TYPE_CHECKING:
    from qkern.ops.tuning import TunedProduct

HELP = "time kernels on this GPU for weights of some shapes, and keep what is fastest"
EXAMPLE = "qkern tune --shapes 4096x4096,14336x4096,4096x14336 --tokens 1,16,512"
_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--shapes",
        type=_shapes,
        required=True,
        metavar="NxK,...",
        help="of weights: out_features x in_features. Layers that fuse_projections joins are one, "
        "with the sum of their out_features",
    )
    parser.add_argument(
        "--tokens",
        type=_counts,
        metavar="M,...",
        help="rows of x, rounded up to powers of 2 (default 1 to 1024)",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default=_DTYPES[0], help=f"of x (default {_DTYPES[0]})"
    )
    parser.add_argument("--device", default="cuda", help="(default cuda)")


def run(args: argparse.Namespace) -> int:
    """Time, and print what was found; exit code 5 where no kernel runs."""
    require(("torch",), "qkern tune", extra="torch")
    import torch

    from qkern.ops import tuning
    from qkern.ops.dequantize import why_no_kernel

    why = why_no_kernel(torch.device(args.device))
    if why:
        msg = f"there is nothing to time on {args.device}: {why}"
        raise OSError(msg)
    path, found = tuning.tune(
        args.shapes,
        args.tokens or tuning.TOKENS,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        report=lambda each: say(_line(each)),
    )
    if args.json:
        rows = [each._asdict() for each in found]
        sys.stdout.write(json.dumps({"file": str(path), "products": rows}) + "\n")
        return exit_codes.DONE
    headers = ("weight", "tokens", "runs", "tile", "us", "shipped us", "times as fast")
    sys.stdout.write(f"{format_table([_cells(each) for each in found], headers)}\n{path}\n")
    return exit_codes.DONE


def _cells(each: TunedProduct) -> tuple[str, ...]:
    tile = "" if each.op == "dense" else "x".join(map(str, each.tile))
    if each.split > 1:
        tile += f", {each.split} share one"
    return (
        *("x".join(map(str, each.shape)), str(each.tokens), each.op, tile),
        *(f"{each.seconds * 1e6:.1f}", f"{each.before * 1e6:.1f}"),
        f"{each.before / each.seconds:.2f}",
    )


def _line(each: TunedProduct) -> str:
    weight, tokens, op, tile, now, before, _ = _cells(each)
    return f"{weight}, {tokens} tokens: {before} us, now {now} us ({op} {tile})"


def _shapes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", part) for part in text.split(",")]
    if not all(found):
        msg = f"{text!r} is no list of shapes such as 4096x4096,14336x4096"
        raise argparse.ArgumentTypeError(msg)
    return [(int(each[1]), int(each[2])) for each in found if each]


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9][0-9]{0,6}(,[1-9][0-9]{0,6})*", text):
        msg = f"{text!r} is no list of numbers such as 1,16,512"
        raise argparse.ArgumentTypeError(msg)
    return [int(part) for part in text.split(",")]
