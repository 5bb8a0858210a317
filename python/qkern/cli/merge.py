"""``qkern merge``: an adapter added to its base from file to file."""

from __future__ import annotations

import argparse

from qkern.cli import exit_codes
from qkern.cli.checkpoint_run import (
    add_format_arguments,
    add_run_arguments,
    format_arguments,
    run_arguments,
    running,
    share,
    tell,
)
from qkern.formats import DTYPES

HELP = "add an adapter to its base, and write one checkpoint, without torch"
EXAMPLE = "qkern merge ./SmolLM2-nf4 ./adapter ./SmolLM2-merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "base", metavar="BASE", help="directory with safetensors, dense or quantized"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="directory with PEFT's two files")
    parser.add_argument("dst", metavar="OUT", help="directory to write")
    what = parser.add_argument_group("result")
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        metavar="DTYPE",
        help=f"of a dense result: {', '.join(reversed(DTYPES))} (default bfloat16)",
    )
    add_format_arguments(what, purpose="quantize the result again: ", default=None)
    what.add_argument(
        "--min-kept",
        type=share,
        default=0.5,
        metavar="X",
        help="exit with 3 if a quantized result keeps less than this share of what the adapter "
        "adds, 0 to 1 (default 0.5)",
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Merge, and print the report."""
    import qkern

    with running(args, "merging", args.dst) as progress:
        report = qkern.merge_checkpoint(
            args.base,
            args.adapter,
            args.dst,
            dtype=args.dtype,
            quant_type=args.quant_type,
            **format_arguments(args),
            min_kept=args.min_kept,
            **run_arguments(args),
            progress=progress,
        )
    tell(args, report)
    return exit_codes.DONE
