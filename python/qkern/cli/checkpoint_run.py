"""What the commands share that read and write checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from qkern.cli.terminal import byte_progress
from qkern.formats import BLOCKSIZES, QUANT_TYPES


class Report(Protocol):
    """What such a command prints."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""


def add_format_arguments(
    what: argparse._ArgumentGroup, *, purpose: str = "", default: str | None = "nf4"
) -> None:
    """Declare a format: its name, for some ``purpose``, and what it has beside that."""
    names = ", ".join(QUANT_TYPES)
    what.add_argument(
        "--format",
        "--quant-type",
        dest="quant_type",
        choices=QUANT_TYPES,
        default=default,
        metavar="TYPE",
        help=purpose + (names if default is None else f"{names} (default {default})"),
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


def format_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The same for the call."""
    return {
        "blocksize": args.blocksize,
        "double_quant": not args.no_double_quant,
        "method": args.method,
    }


def add_name_arguments(which: argparse._ArgumentGroup) -> None:
    """Declare which tensors are quantized."""
    names: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    which.add_argument(
        "--include", **names, help="name, end or glob of tensors to quantize too; repeatable"
    )
    which.add_argument("--exclude", **names, help="the same of tensors to leave dense")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a run goes."""
    how = parser.add_argument_group("run")
    how.add_argument(
        "--threads", type=_count, default=0, metavar="N", help="0 for one per core (default)"
    )
    how.add_argument(
        "--no-mmap",
        action="store_true",
        help="copy weights, not map them: slower, but a file that cannot be read is an error",
    )
    how.add_argument("--dry-run", action="store_true", help="check and report, write nothing")
    how.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint in DST, and an unfinished run of other settings",
    )
    how.add_argument("--quiet", action="store_true", help="no progress, and no report on success")


def run_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The same for the call."""
    return {
        "threads": args.threads,
        "mmap": not args.no_mmap,
        "dry_run": args.dry_run,
        "force": args.force,
    }


@contextlib.contextmanager
def running(
    args: argparse.Namespace, what: str, destination: str
) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar, unless it is unwanted; an interrupt says how to go on."""
    shown = contextlib.nullcontext() if args.quiet else byte_progress(what)
    try:
        with shown as progress:
            yield progress
    except KeyboardInterrupt as error:
        msg = f"interrupted: the same command goes on with {Path(destination)}"
        raise KeyboardInterrupt(msg) from error


def tell(args: argparse.Namespace, report: Report) -> None:
    """Print the report as it is wanted."""
    if args.json:
        sys.stdout.write(json.dumps(report.as_dict(), allow_nan=False) + "\n")
    elif not args.quiet:
        sys.stdout.write(f"{report}\n")


def share(text: str) -> float:
    """An argument between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:  # NaN is not
        msg = f"{text} is not between 0 and 1"
        raise argparse.ArgumentTypeError(msg)
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        msg = f"{text!r} is no number of threads"
        raise argparse.ArgumentTypeError(msg)
    return int(text)
