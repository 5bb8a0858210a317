"""How much of an adapter's gain is left after a merge, with and without training for it.

python benches/merge_quality.py --model DIR --text FILE [--save]

A small Llama is quantized to NF4 and trained on the start of a text; gain is how far the loss on
the rest falls below that of the quantized model. Every variant takes the same steps, on the same
batches:

    adapter           trained as usual, not merged: the gain that the shares are of
    bf16 merge        the same adapter, added to the dense base, rounded to bf16
    nf4 merge         the same adapter, quantized again: by absmax, by search
    from the start    merge_into="nf4" in all steps, then merged
    last half         the usual training, with merge_into in its last half only, then merged
    as PEFT applies   the adapter of that training, added without rounding

--time SIZE also measures what a training step takes with merge_into, against one without. What a
run does not measure stays in the results as it is (--seeds without any: times alone).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qkern
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

NF4 = qkern.QuantFormat("nf4")
METHODS = ("absmax", "search")
LENGTH, BATCH, R = 128, 8, 8
CHARACTERS = 500_000  # of the text
HELDOUT = 48  # sequences


class Task(NamedTuple):
    """A dense model, and sequences (n, LENGTH) to train it on and to test it with."""

    model: nn.Module
    train: Tensor
    heldout: Tensor


def load_task(model: Path, text: Path, characters: int = CHARACTERS) -> Task:
    """The end of the text is held out."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = text.read_text()[:characters].splitlines(keepends=True)
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
    flat = torch.tensor([i for line in ids for i in line])
    count = len(flat) // LENGTH
    rows = flat[: count * LENGTH].view(count, LENGTH)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cut = count - min(HELDOUT, count // 4)
    return Task(dense, rows[:cut], rows[cut:])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean over the tokens of a batch."""
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


@torch.no_grad()
def heldout_loss(model: nn.Module, task: Task) -> float:
    """Mean over the held-out tokens."""
    model.eval()
    batches = task.heldout.split(16)
    total = sum(float(loss_of(model, batch)) * len(batch) for batch in batches)
    return total / len(task.heldout)


class Training:
    """Adapters of a quantized model under AdamW, with a cosine schedule."""

    def __init__(self, task: Task, seed: int, steps: int, lr: float, merge_into: Any) -> None:
        self.model = copy.deepcopy(task.model)
        qkern.quantize_model(self.model, NF4)
        torch.manual_seed(seed)
        qkern.add_lora(self.model, r=R, lora_alpha=2 * R, merge_into=merge_into)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        self.batches = torch.randint(0, len(task.train), (steps, BATCH), generator=generator)
        self.steps, self.lr, self.done = steps, lr, 0

    def go_on(self, task: Task, end: int) -> Training:
        """Train up to the step ``end``."""
        self.model.train()
        for step in range(self.done, end):
            for group in self.optimizer.param_groups:
                warm = min(1.0, (step + 1) / 10)
                group["lr"] = self.lr * warm * (1 + math.cos(math.pi * step / self.steps)) / 2
            loss_of(self.model, task.train[self.batches[step]]).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.done = end
        return self


def seed_row(task: Task, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """Held-out losses of all variants, and shares of the gain."""
    model = copy.deepcopy(task.model)
    qkern.quantize_model(model, NF4)
    losses, kept = {"base": heldout_loss(model, task)}, {}
    begun = Training(task, seed, steps, lr, None).go_on(task, steps // 2)
    plain = copy.deepcopy(begun).go_on(task, steps).model
    losses["adapter"] = heldout_loss(plain, task)
    dense = copy.deepcopy(plain)
    kept["bf16 merge"] = qkern.merge_to_dense(dense, dtype=torch.bfloat16).kept
    losses["bf16 merge"] = heldout_loss(dense.float(), task)
    for method in METHODS:
        name = f"nf4 merge, {method}"
        kept[name] = qkern.merge_adapter(plain, method=method).kept
        losses[name] = heldout_loss(plain, task)
        qkern.unmerge_adapter(plain)
    whole = Training(task, seed, steps, lr, "nf4").go_on(task, steps).model
    losses["from the start, absmax"] = merged_loss(whole, task)
    for method in METHODS:
        half = copy.deepcopy(begun)
        qkern.set_merge_into(half.model, qkern.MergeTarget(NF4, method))
        trained = half.go_on(task, steps).model
        losses[f"last half, {method}"] = merged_loss(trained, task)
        qkern.unmerge_adapter(trained)
        qkern.set_merge_into(trained, None)
        losses[f"as PEFT applies it, {method}"] = heldout_loss(trained, task)
    gain = losses["base"] - losses["adapter"]
    shares = {
        name: (losses["base"] - loss) / gain
        for name, loss in losses.items()
        if name not in ("base", "adapter")
    }
    return {
        "case": "share of the gain",
        "seed": seed,
        "steps": steps,
        "learning rate": lr,
        "loss": losses,
        "share": shares,
        "kept of the weights": kept,
    }


def merged_loss(model: nn.Module, task: Task) -> float:
    """Of a model that was trained for its merge, after it; the same to the bit as before."""
    before = heldout_loss(model, task)
    qkern.merge_adapter(model, min_kept=1.0)
    after = heldout_loss(model, task)
    if before != after:
        msg = f"a merge without loss changed the loss from {before} to {after}"
        raise AssertionError(msg)
    return after


def time_rows(size: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a training step of a random Llama with merge_into, and without; 512 tokens."""
    config = LlamaConfig(
        hidden_size=size,
        intermediate_size=size * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        vocab_size=512,
    )
    ids = torch.randint(0, 512, (1, 512), generator=torch.Generator().manual_seed(0))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        engines = {}
        targets = {"none": None, **{m: qkern.MergeTarget(NF4, m) for m in METHODS}}
        for name, target in targets.items():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(dtype)
            qkern.quantize_model(model, NF4)
            qkern.add_lora(model, r=R, lora_alpha=2 * R, merge_into=target)
            engines[name] = partial(_step, model.train(), ids)
        times = harness.interleaved(engines, repeats=repeats)
        for name in targets:
            ratio = times[name]["median"] / times["none"]["median"]
            rows.append(
                {
                    "case": "time of a step",
                    "model": f"2 layers of {size}, 512 tokens",
                    "dtype": str(dtype).removeprefix("torch."),
                    "merge_into": name,
                    "times none": ratio,
                    **times[name],
                }
            )
    return rows


def _step(model: nn.Module, ids: Tensor) -> None:
    loss_of(model, ids).backward()
    model.zero_grad()


def run(
    task: Task, *, seeds: Sequence[int], steps: int, rates: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A row for each learning rate and seed."""
    for lr in rates:
        for seed in seeds:
            yield seed_row(task, seed, steps, lr)


def save(rows: list[dict[str, Any]]) -> Path:
    """Add the rows to the results, in the place of those of the same case."""
    file = harness.RESULTS / "merge_quality.json"
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    every = {_case(row): row for row in (*before, *rows)}
    return harness.save("merge_quality", [every[case] for case in sorted(every)])


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("case", "learning rate", "seed", "model", "dtype", "merge_into")
    return tuple(str(row.get(name, "")) for name in names)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the range of the shares; then the times."""
    cells: list[tuple[Any, ...]] = []
    quality = [row for row in rows if "share" in row]
    for lr in dict.fromkeys(row["learning rate"] for row in quality):
        mine = [row for row in quality if row["learning rate"] == lr]
        for name in mine[0]["loss"]:
            loss = statistics.fmean(row["loss"][name] for row in mine)
            shares = [row["share"].get(name) for row in mine]
            shown = "-"
            if name == "adapter":
                shown = "100 %"
            elif shares[0] is not None:
                low, high = min(shares), max(shares)
                shown = f"{statistics.fmean(shares):.1%} ({low:.1%} to {high:.1%})"
            cells.append((f"{lr:g}", name, f"{loss:.4f}", shown))
    headers = ("learning rate", "variant", "loss", "share of the gain")
    text = format_table(cells, headers) if cells else ""
    times = [
        (row["model"], row["dtype"], row["merge_into"], f"{row['times none']:.2f}")
        for row in rows
        if "times none" in row
    ]
    headers = ("model", "dtype", "merge_into", "time of a step")
    return f"{text}\n\n{format_table(times, headers)}".strip() if times else text


def main() -> None:
    """Run, print, and with --save write results/merge_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="directory of a small Llama")
    parser.add_argument("--text", type=Path, help="what to train on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--time", type=int, metavar="SIZE", help="hidden size, e.g. 1024")
    parser.add_argument("--save", action="store_true", help="write results/merge_quality.json")
    options = parser.parse_args()
    rows = time_rows(options.time, repeats=3) if options.time else []
    if options.seeds:
        task = load_task(options.model, options.text)
        how = {"seeds": options.seeds, "steps": options.steps, "rates": options.rates}
        for row in run(task, **how):
            rows.append(row)
            print(table([row]), end="\n\n", flush=True)
            if options.save:  # what takes long is kept
                save(rows)
    print(table(rows))
    if options.save:
        print(f"wrote {save(rows)}")


if __name__ == "__main__":
    main()
