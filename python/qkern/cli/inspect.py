"""``qkern inspect``: what quantization does, or did, to the tensors of a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qkern.cli import exit_codes
from qkern.cli.checkpoint_run import add_format_arguments, add_name_arguments
from qkern.cli.terminal import byte_progress, say
from qkern.errors import FormatError
from qkern.training.requirements import require

if TYPE_CHECKING:
    from qkern.checkpoint.inspection_report import InspectionReport

HELP = "show errors, outliers and coverage of a checkpoint, or how two of them differ"
EXAMPLE = "qkern inspect ./SmolLM2-135M-Instruct --format nf4 --chart errors.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory with safetensors, dense or quantized; or a file"
    )
    parser.add_argument(
        "--compare", metavar="OTHER", help="show errors against this checkpoint, dense or quantized"
    )
    parser.add_argument(
        "--max-error",
        type=_size,
        metavar="X",
        help="exit with 3 if a tensor's relative RMS error is above X",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--top", type=_count, default=10, metavar="N", help="worst tensors and blocks (default 10)"
    )
    shown.add_argument(
        "--outliers",
        type=_size,
        default=6.0,
        metavar="K",
        help="count values beyond K times the RMS of their tensor (default 6)",
    )
    shown.add_argument("--chart", metavar="FILE", help="error of each layer, as .png or .svg")
    shown.add_argument("--histogram", metavar="FILE", help="weights and codes, as .png or .svg")
    trial = parser.add_argument_group(
        "dense checkpoints", "what to try on them; not used with --compare"
    )
    add_format_arguments(trial)
    add_name_arguments(trial)


def run(args: argparse.Namespace) -> int:
    """Print the report, draw what was asked for; 3 above ``--max-error``, or if nothing meets."""
    require(("torch", "safetensors"), "qkern inspect", extra="torch")
    import qkern
    from qkern.checkpoint.charts import check_chart_path, write_error_chart, write_histogram
    from qkern.checkpoint.inspection_text import render

    charts = [check_chart_path(name) for name in (args.chart, args.histogram) if name]
    if len(charts) == 2 and charts[0].resolve() == charts[1].resolve():
        msg = f"--chart and --histogram both name {charts[0]}: give each a file of its own"
        raise FormatError(msg)
    _check_errors_exist(args)
    with byte_progress("inspecting") as progress:
        report = qkern.inspect_checkpoint(
            args.model,
            args.quant_type,
            blocksize=args.blocksize,
            double_quant=not args.no_double_quant,
            method=args.method,
            include=args.include,
            exclude=args.exclude,
            compare=args.compare,
            outlier_rms=args.outliers,
            histogram=args.histogram is not None,
            progress=progress,
        )
    if args.chart:
        say(f"wrote {write_error_chart(report, args.chart)}")
    if args.histogram:
        say(f"wrote {write_histogram(report, args.histogram)}")
    above = () if args.max_error is None else report.exceeding(args.max_error)
    if args.json:
        content = report.as_dict() | {"max_error": args.max_error, "exceeding": list(above)}
        content["worst"] = content["worst"][: args.top]
        text = json.dumps(content, allow_nan=False)
    else:
        text = render(report, args.top)
    sys.stdout.write(text + "\n")
    if above:
        say(
            f"qkern inspect: above --max-error {args.max_error:g} or not to be measured: "
            f"{len(above)}, the first is {above[0]}"
        )
    unmet = _unmet(report)
    if unmet:
        say(f"qkern inspect: {unmet}")
    return exit_codes.NO if above or unmet else exit_codes.DONE


def _unmet(report: InspectionReport) -> str:
    """Why a comparison compared nothing, which is a no without a threshold too; else empty."""
    other = report.comparison
    if other is None or any(row.error is not None for row in report.tensors):
        return ""
    here, there = (next(iter(names), "nothing") for names in (other.only_here, other.only_there))
    found = f"{report.path} has {here}, {other.path} has {there}"
    if not (other.only_here or other.only_there):
        found = "names are the same, but shapes differ, or dtypes are not read"
    return f"not one tensor could be compared: {found}: are both checkpoints of one model?"


def _check_errors_exist(args: argparse.Namespace) -> None:
    """Refuse before the work what a quantized checkpoint by itself cannot answer."""
    from qkern.checkpoint.reader import CheckpointReader

    if args.compare is not None or (args.chart is None and args.max_error is None):
        return
    with CheckpointReader(args.model) as reader:
        quantized = reader.is_quantized
    if quantized:
        msg = (
            f"{Path(args.model)} is quantized: its errors, and so --chart and --max-error, need "
            "--compare with the dense original"
        )
        raise FormatError(msg)


def _count(text: str) -> int:
    return int(_least(int(text), text))


def _size(text: str) -> float:
    return _least(float(text), text)


def _least(value: float, text: str) -> float:
    if not value >= 0:  # NaN is not
        msg = f"{text} is not 0 or more"
        raise argparse.ArgumentTypeError(msg)
    return value
