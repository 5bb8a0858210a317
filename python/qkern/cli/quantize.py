"""``qkern quantize``: a checkpoint quantized from file to file."""

from __future__ import annotations

import argparse

from qkern.cli import exit_codes
from qkern.cli.checkpoint_run import (
    add_format_arguments,
    add_name_arguments,
    add_run_arguments,
    format_arguments,
    run_arguments,
    running,
    share,
    tell,
)

HELP = "quantize a checkpoint from file to file, in little memory, without torch"
EXAMPLE = "qkern quantize ./SmolLM2-135M-Instruct ./SmolLM2-nf4 --format nf4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("src", metavar="SRC", help="directory with safetensors, dense; or a file")
    parser.add_argument("dst", metavar="DST", help="directory to write")
    what = parser.add_argument_group("format")
    add_format_arguments(what)
    which = parser.add_argument_group("which tensors")
    add_name_arguments(which)
    which.add_argument(
        "--embeddings",
        choices=("int8_row",),
        metavar="TYPE",
        help="quantize embeddings and output head too, as int8_row",
    )
    which.add_argument(
        "--min-coverage",
        type=share,
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
            **format_arguments(args),
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
