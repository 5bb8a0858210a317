"""``qkern quantize``: a checkpoint quantized from file to file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from qkern.cli import exit_codes
from qkern.cli.terminal import byte_progress
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
    how = parser.add_argument_group("run")
    how.add_argument(
        "--threads", type=_count, default=0, metavar="N", help="0 for one per core (default)"
    )
    how.add_argument("--dry-run", action="store_true", help="check and report, write nothing")
    how.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint in DST, and an unfinished run of other settings",
    )
    how.add_argument("--quiet", action="store_true", help="no progress, and no report on success")


def run(args: argparse.Namespace) -> int:
    """Quantize, and print the report."""
    import qkern

    shown = contextlib.nullcontext() if args.quiet else byte_progress("quantizing")
    try:
        with shown as progress:
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
                threads=args.threads,
                dry_run=args.dry_run,
                force=args.force,
                progress=progress,
            )
    except KeyboardInterrupt as error:
        msg = f"interrupted: the same command goes on with {Path(args.dst)}"
        raise KeyboardInterrupt(msg) from error
    if args.json:
        sys.stdout.write(json.dumps(report.as_dict(), allow_nan=False) + "\n")
    elif not args.quiet:
        sys.stdout.write(f"{report}\n")
    return exit_codes.DONE


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        msg = f"{text!r} is no number of threads"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:  # NaN is not
        msg = f"{text} is not between 0 and 1"
        raise argparse.ArgumentTypeError(msg)
    return share
