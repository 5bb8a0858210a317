"""``qkern quantize``: a checkpoint quantized from file to file."""

from __future__ import annotations

import argparse
from typing import Any

from qkern.cli import exit_codes
from qkern.cli.checkpoint_run import add_run_arguments, run_arguments, running, tell
from qkern.formats import BLOCKSIZES, QUANT_TYPES

HELP = "quantize a checkpoint from file to file, in little memory, without torch"
EXAMPLE = "qkern quantize ./SmolLM2-135M-Instruct ./SmolLM2-nf4 --format nf4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("src", metavar="SRC", help="directory with safetensors, dense; or a file")
    parser.add_argument("dst", metavar="DST", help="directory to write")
    what = parser.add_argument_group("format")
    what.add_argument(
        "--format",
        "--quant-type",
        dest="quant_type",
        choices=QUANT_TYPES,
        default="nf4",
        metavar="TYPE",
        help=f"{', '.join(QUANT_TYPES)} (default nf4)",
    )
    what.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCKSIZES,
        default=64,
        metavar="N",
        help=f"values that share a scale: {', '.join(map(str, BLOCKSIZES))} (default 64); "
        "of int8_row a row does",
    )
    what.add_argument("--no-double-quant", action="store_true", help="scales in fp32, not 8 bits")
    what.add_argument(
        "--method",
        default="absmax",
        metavar="NAME",
        help="how codes are chosen: absmax, or search for less error (4-bit types only) "
        "(default absmax)",
    )
    which = parser.add_argument_group("which tensors")
    names: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    which.add_argument(
        "--include", **names, help="name, end or glob of tensors to quantize too; repeatable"
    )
    which.add_argument("--exclude", **names, help="the same of tensors to leave dense")
    which.add_argument(
        "--embeddings",
        choices=("int8_row",),
        metavar="TYPE",
        help="quantize embeddings and output head too, as int8_row",
    )
    which.add_argument(
        "--min-coverage",
        type=_share,
        metavar="X",
        help="exit with 3 if less than this share of the values, 0 to 1, is quantized",
    )
    which.add_argument(
        "--strict",
        action="store_true",
        help="exit with 3 if a weight stays dense that is no embedding, output head or router and "
        "not excluded, or if 8 bits cannot hold the scales of one",
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Quantize, and print the report."""
    import qkern

    with running(args, "quantizing", args.dst) as progress:
        report = qkern.quantize_checkpoint(
            args.src,
            args.dst,
            args.quant_type,
            blocksize=args.blocksize,
            double_quant=not args.no_double_quant,
            method=args.method,
            include=args.include,
            exclude=args.exclude,
            min_coverage=args.min_coverage,
            strict=args.strict,
            embeddings=args.embeddings,
            **run_arguments(args),
            progress=progress,
        )
    tell(args, report)
    return exit_codes.DONE


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:  # NaN is not
        msg = f"{text} is not between 0 and 1"
        raise argparse.ArgumentTypeError(msg)
    return share
