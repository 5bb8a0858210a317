"""``qkern convert``: a checkpoint in another layout or dtype."""

from __future__ import annotations

import argparse

from qkern.cli import exit_codes
from qkern.cli.checkpoint_run import add_run_arguments, run_arguments, running, tell
from qkern.formats import DTYPES, QUANT_TYPES

HELP = "write a checkpoint for qkern, for bitsandbytes, or as dense weights, without torch"
EXAMPLE = "qkern convert ./Llama-bnb-4bit ./Llama-bf16 --to bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "src", metavar="SRC", help="directory with safetensors, dense, bitsandbytes' or qkern's"
    )
    parser.add_argument("dst", metavar="DST", help="directory to write")
    targets = ("qkern", "bitsandbytes", "dense", *reversed(DTYPES))
    parser.add_argument(
        "--to",
        required=True,
        choices=targets,
        metavar="WHAT",
        help=f"{', '.join(targets)}; quantized weights keep their codes, or become dense values, "
        "with dense in the dtype that config.json names",
    )
    parser.add_argument(
        "--format",
        "--quant-type",
        dest="quant_type",
        choices=QUANT_TYPES,
        metavar="TYPE",
        help=f"of a dense SRC that is to be quantized: {', '.join(QUANT_TYPES)}; qkern quantize "
        "has more to say of that",
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and print the report."""
    import qkern

    with running(args, "converting", args.dst) as progress:
        report = qkern.convert_checkpoint(
            args.src,
            args.dst,
            args.to,
            quant_type=args.quant_type,
            **run_arguments(args),
            progress=progress,
        )
    tell(args, report)
    return exit_codes.DONE
