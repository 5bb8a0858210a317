"""``qkern finetune``: a LoRA adapter from a model and a data file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from qkern.cli import exit_codes
from qkern.cli.terminal import say, wants_colour
from qkern.formats import BLOCKSIZES, QUANT_TYPES
from qkern.text_table import format_bytes, format_table
from qkern.training.config import COMPUTE, DEVICES, DTYPES, SCHEDULES, FinetuneConfig
from qkern.training.finetune import FinetuneResult, check_start, finetune
from qkern.training.libraries import quiet_libraries
from qkern.training.prepare import PreparedData, prepare_data
from qkern.training.record import RunRecord
from qkern.training.requirements import TRAINING, require

HELP = "train a LoRA adapter over a quantized model"
EXAMPLE = "qkern finetune ./SmolLM2-135M-Instruct chats.jsonl -o adapter --steps 100"

_DEFAULTS = FinetuneConfig()
_SHOWN_ROWS = ("steps", "first_loss", "last_loss", "seconds", "tokens_per_second", "trainable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; settings that are not given stay absent from the namespace."""
    parser.add_argument("model", metavar="MODEL", help="model directory or GGUF file")
    parser.add_argument(
        "data", metavar="DATA", help=".jsonl with text, prompt/completion or messages; or .txt"
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="adapter directory")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the data, show an example, and stop"
    )
    run = parser.add_argument_group("training")
    _setting(run, "epochs", float, "passes over the data")
    _setting(run, "steps", int, "optimizer steps, in place of --epochs")
    _setting(run, "lr", float, "peak learning rate")
    _setting(run, "schedule", str, "of the learning rate", choices=SCHEDULES)
    _setting(run, "warmup_ratio", float, "share of the steps for warming up")
    _setting(run, "max_grad_norm", float, "gradient clipping")
    _setting(run, "weight_decay", float, "AdamW's weight decay")
    _setting(run, "batch_size", int, "sequences of a forward pass")
    _setting(run, "grad_accum", int, "forward passes of a step")
    _setting(run, "max_length", int, "most tokens of a sequence")
    _flag(run, "group_by_length", "--no-group-by-length", "batches of mixed lengths", on=False)
    _setting(run, "dtype", str, "of the arithmetic", choices=DTYPES)
    int8 = "int8 rounds inputs of the frozen layers to 8 bits, faster on a CPU"
    _setting(run, "compute", str, int8, choices=COMPUTE)
    _setting(run, "device", str, "where to train", choices=DEVICES)
    _flag(run, "gradient_checkpointing", "--gradient-checkpointing", "less memory, more time")
    _setting(run, "save_steps", int, "steps between checkpoints, 0 for none")
    _setting(run, "save_total_limit", int, "checkpoints that are kept")
    _setting(run, "seed", int, "of adapter, data order and dropout")
    lora = parser.add_argument_group("adapter")
    _setting(lora, "r", int, "rank")
    _setting(lora, "lora_alpha", float, "the adapter is scaled by lora-alpha / r")
    _setting(lora, "lora_dropout", float, "dropout on the adapter's input")
    _flag(lora, "use_rslora", "--use-rslora", "scale by lora-alpha / sqrt(r)")
    _flag(lora, "use_dora", "--use-dora", "train the lengths of the rows too")
    into = "train for a merge into this format, which then loses nothing (qkern merge --format)"
    _setting(lora, "merge_into", str, into, choices=QUANT_TYPES)
    _setting(lora, "target_modules", str, "all-linear, or names separated by commas")
    lora.add_argument(
        "--target-parameters",
        default=argparse.SUPPRESS,
        metavar="PARAMETERS",
        help="weights of stacked experts: experts.gate_up_proj,experts.down_proj",
    )
    base = parser.add_argument_group("frozen weights")
    _setting(base, "quant_type", str, "format", choices=QUANT_TYPES)
    shared = "values that share a scale; unused by int8_row"
    _setting(base, "blocksize", int, shared, choices=BLOCKSIZES)
    _flag(base, "double_quant", "--no-double-quant", "scales in fp32 instead of 8 bits", on=False)


def run(args: argparse.Namespace) -> int:
    """Check the data, show one example, train, and print the figures."""
    require(TRAINING, "qkern finetune")
    quiet_libraries()
    from qkern.integrations.pretrained import load_tokenizer

    config = _config(args)
    # A dry run writes nothing: an earlier run in OUT is not in its way.
    overwrite = args.overwrite or args.dry_run
    check_start(args.model, args.output, config, resume=args.resume, overwrite=overwrite)
    tokenizer = load_tokenizer(args.model)
    data = prepare_data(args.data, tokenizer, max_length=config.max_length)
    if args.dry_run:
        _show_dry_run(data, config, as_json=args.json)
        return exit_codes.DONE
    say(_preview(data, colour=wants_colour(sys.stderr)))
    result = finetune(
        args.model,
        data,
        args.output,
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=True,
        say=say,
    )
    sys.stdout.write((json.dumps(result.as_dict()) if args.json else _show(result)) + "\n")
    return exit_codes.DONE


def _setting(group: Any, name: str, kind: type, text: str, *, choices: Any = None) -> None:
    """An option of the same name as a setting, with its default in the help."""
    default = getattr(_DEFAULTS, name)
    shown = "" if default is None else f" (default {default:g})" if kind is float else ""
    shown = shown or ("" if default is None else f" (default {default})")
    group.add_argument(
        f"--{name.replace('_', '-')}",
        dest=name,
        type=kind,
        choices=choices,
        default=argparse.SUPPRESS,
        metavar=None if choices else name.rpartition("_")[2].upper(),
        help=text + shown,
    )


def _flag(group: Any, name: str, option: str, text: str, *, on: bool = True) -> None:
    group.add_argument(
        option, dest=name, action="store_const", const=on, default=argparse.SUPPRESS, help=text
    )


def _config(args: argparse.Namespace) -> FinetuneConfig:
    """The settings that were given, over those of the resumed run or the defaults."""
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    for key in ("target_modules", "target_parameters"):
        targets = given.get(key, "all-linear")
        if targets != "all-linear":
            given[key] = tuple(name.strip() for name in targets.split(",") if name.strip())
    start = RunRecord.read(Path(args.output)).config if args.resume else FinetuneConfig()
    return dataclasses.replace(start, **given)


def _preview(data: PreparedData, *, colour: bool) -> str:
    marks = "dim is context, bold is trained" if colour else "[[ ]] is trained"
    lines = [f"first example ({marks}):", data.preview(colour=colour), "", str(data.summary)]
    return "\n".join([*lines, *(f"note: {note}" for note in data.notes)])


def _show_dry_run(data: PreparedData, config: FinetuneConfig, *, as_json: bool) -> None:
    steps = config.total_steps(len(data.examples))
    if as_json:
        content = dataclasses.asdict(data.summary) | {"steps": steps, "notes": data.notes}
        text = json.dumps(content | {"preview": data.preview()})
    else:
        plan = f"would run {steps} steps of {config.effective_batch} sequences"
        text = f"{_preview(data, colour=wants_colour(sys.stdout))}\n{plan}"
    sys.stdout.write(text + "\n")


def _show(result: FinetuneResult) -> str:
    values = result.as_dict()
    rows = [(name.replace("_", " "), values[name]) for name in _SHOWN_ROWS if name in values]
    rows += [
        ("peak memory", format_bytes(result.peak_memory)),
        ("model", f"{format_bytes(result.bytes_before)} -> {format_bytes(result.bytes_after)}"),
        ("adapter", str(result.output_dir)),
    ]
    return format_table([(name, str(_round(value))) for name, value in rows])


def _round(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
