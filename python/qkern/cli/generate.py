"""``qkern generate``: text from a model, with an adapter if one is given."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from qkern.cli import exit_codes
from qkern.formats import BLOCKSIZES, QUANT_TYPES, resolve_format
from qkern.training.config import COMPUTE, DEVICES, DTYPES
from qkern.training.libraries import quiet_libraries
from qkern.training.requirements import GENERATION, require

HELP = "generate text from a model and its adapter"
EXAMPLE = 'qkern generate ./SmolLM2-135M-Instruct --adapter adapter "What is a tuple?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory or GGUF file")
    parser.add_argument("prompt", metavar="PROMPT", help="the question, or - to read it from stdin")
    parser.add_argument("--adapter", metavar="DIR", help="what qkern finetune or PEFT wrote")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--no-chat", action="store_true", help="continue the prompt as plain text")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="when sampling")
    parser.add_argument("--seed", type=int, default=0, help="when sampling")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument(
        "--compute",
        choices=COMPUTE,
        default="exact",
        help="int8 rounds inputs of quantized layers to 8 bits, faster on a CPU",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    base = parser.add_argument_group(
        "frozen weights", "as the adapter was trained; without an adapter, as the files are"
    )
    base.add_argument("--quant-type", choices=QUANT_TYPES)
    base.add_argument(
        "--blocksize", type=int, choices=BLOCKSIZES, default=64, help="unused by int8_row"
    )
    base.add_argument("--no-double-quant", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print the answer as it comes."""
    require(GENERATION, "qkern generate")
    quiet_libraries()
    from qkern.training.generate import generate

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = _load(args)
    answer = generate(
        model,
        tokenizer,
        prompt,
        chat=not args.no_chat,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stream=None if args.json else _write,
    )
    if args.json:
        content = {"prompt": prompt, **dataclasses.asdict(answer)}
        content["tokens_per_second"] = answer.tokens / answer.seconds
        sys.stdout.write(json.dumps(content))
    sys.stdout.write("\n")
    return exit_codes.DONE


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from qkern.integrations.pretrained import load_tokenizer
    from qkern.training.base import check_compute, load_finetuned, resolve_device, resolve_dtype

    fmt = None
    if args.quant_type is not None:
        fmt = resolve_format(
            args.quant_type, blocksize=args.blocksize, double_quant=not args.no_double_quant
        )
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    check_compute(args.compute, device)
    tokenizer = load_tokenizer(args.model)
    model: Any = load_finetuned(
        args.model, args.adapter, fmt=fmt, dtype=dtype, compute=args.compute
    )
    return model.to(device), tokenizer


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
