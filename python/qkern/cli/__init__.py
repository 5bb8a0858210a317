"""The ``qkern`` command: one file per subcommand, each over one public function.

Results go to stdout, progress and messages to stderr. Exit codes: see ``exit_codes``. Nothing
heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from qkern.cli import exit_codes
from qkern.errors import QkernError

# Each module has HELP, EXAMPLE, add_arguments(parser) and run(args) -> exit code.
COMMANDS = ("convert", "doctor", "finetune", "generate", "inspect", "merge", "quantize", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``qkern``; those of the process if None.

    Returns:
        The exit code: 0 done, 2 usage, 3 "no", 4 bad input file, 5 I/O, 130 interrupted.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as error:  # argparse has printed what is wrong, or the help
        return error.code if isinstance(error.code, int) else exit_codes.USAGE
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `qkern ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.IO
    except KeyboardInterrupt as error:
        return _fail(args, error, str(error) or "interrupted")
    except (QkernError, OSError) as error:
        return _fail(args, error, str(error))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkern", description="Frozen weights in 4 or 8 bits, with LoRA in the same kernel."
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"qkern.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        import qkern

        sys.stdout.write(f"qkern {qkern.__version__}\n")
        parser.exit()


def _fail(args: argparse.Namespace, error: BaseException, message: str) -> int:
    """One clear line, and with --json the same for programs; the exit code of the error."""
    code = exit_codes.of(error)
    sys.stderr.write(f"qkern {args.command}: {message}\n")
    if args.json:
        content = {"type": type(error).__name__, "message": message, "exit_code": code}
        sys.stdout.write(json.dumps({"error": content}) + "\n")
    return code
