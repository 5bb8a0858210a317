"""What a start by LoftQ gains: what is left of each weight, and losses before and after training.

python benches/loftq_quality.py --weights MiniLM=FILE --stories DIR --train FILE --heldout FILE

    residual   |W - (Q + s B A)| / |W| of each layer, after 0, 1 and 5 iterations
    loss       of held-out documents at the start, and after the same steps of training

The files are named, and not a part of the project: safetensors of any model; the directory of a
small Llama; texts, a JSON document with "text" on each line.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qkern
from qkern.lora_init import start_from_weight
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

ITERATIONS = (0, 1, 5)
METHODS = ("absmax", "search")
ALPHA_BY_R = 2.0
# Base format, method, and the start of the adapter, of each model that is trained.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "INT8": ("int8", "absmax", {}),
    "NF4": ("nf4", "absmax", {}),
    "NF4 + search": ("nf4", "search", {}),
    "NF4 + LoftQ 1": ("nf4", "absmax", {"loftq_iterations": 1}),
    "NF4 + LoftQ 5": ("nf4", "absmax", {"loftq_iterations": 5}),
    "NF4 + search + LoftQ 1": ("nf4", "search", {"loftq_iterations": 1}),
    "NF4 + search + LoftQ 5": ("nf4", "search", {"loftq_iterations": 5}),
}


def residual_rows(source: str, weights: dict[str, Tensor], r: int) -> list[dict[str, Any]]:
    """What each layer's base and adapter leave of its weight, by its norm."""
    rows = []
    for layer, weight in weights.items():
        W = weight.float()
        rank = min(r, min(W.shape) // 2)
        for method in METHODS:
            q = qkern.quantize(W, "nf4", method=method)
            for iterations in ITERATIONS:
                settings = {"r": rank, "scaling": ALPHA_BY_R, "iterations": iterations}
                start = start_from_weight("loftq", q, W, method=method, **settings)
                base = q if start is None or start.weight is None else start.weight
                total = base.dequantize(torch.float32)
                if start is not None:
                    total = total + ALPHA_BY_R * (start.B @ start.A)
                rows.append(
                    {
                        "case": "residual",
                        "weights": source,
                        "layer": layer,
                        "shape": list(W.shape),
                        "r": rank,
                        "method": method,
                        "iterations": iterations,
                        "value": float((W - total).norm() / W.norm()),
                    }
                )
    return rows


def linear_weights(file: Path) -> dict[str, Tensor]:
    """Matrices of a model's blocks, by the names of their layers."""
    return {
        key.removesuffix(".weight"): tensor
        for key, tensor in load_file(file).items()
        if tensor.dim() == 2 and ("layer." in key or "layers." in key) and key.endswith(".weight")
    }


def documents(file: Path, tokenizer: Any, limit: int) -> list[Tensor]:
    """Token ids (1, length) of each document."""
    texts = (json.loads(line)["text"] for line in file.read_text().splitlines())
    ids = ([tokenizer.bos_token_id or 1, *tokenizer.encode(text)][:limit] for text in texts)
    return [torch.tensor([i]) for i in ids if len(i) > 1]


@torch.no_grad()
def heldout_loss(model: nn.Module, heldout: list[Tensor]) -> float:
    """Nats per token."""
    total = tokens = 0.0
    for ids in heldout:
        logits = model.eval()(ids).logits[0, :-1].double()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


def train(model: nn.Module, train_ids: list[Tensor], steps: int, lr: float, seed: int) -> None:
    """The same batches in the same order for every model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        for i in torch.randint(len(train_ids), (4,), generator=generator).tolist():
            (model(train_ids[i], labels=train_ids[i]).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_rows(
    dense: nn.Module,
    train_ids: list[Tensor],
    heldout: list[Tensor],
    *,
    r: int,
    steps: int,
    lr: float,
    seeds: int,
) -> list[dict[str, Any]]:
    """Held-out losses of each variant: at the start, and after training, mean over the seeds."""
    shared = {"weights": "stories260K", "r": r, "steps": steps, "lr": lr, "seeds": seeds}
    loss = heldout_loss(dense, heldout)
    rows = [{"case": "loss at the start", "method": "dense", "value": loss, **shared}]
    for name, (quant_type, method, start) in VARIANTS.items():
        before, after = [], []
        for seed in range(seeds):
            model = copy.deepcopy(dense)
            qkern.quantize_model(model, quant_type, method=method)
            how: dict[str, Any] = {"r": r, "lora_alpha": ALPHA_BY_R * r, "method": method, **start}
            if start:
                how |= {"init_lora_weights": "loftq", "dense": dense}
            torch.manual_seed(seed)
            qkern.add_lora(model, **how)
            before.append(heldout_loss(model, heldout))
            train(model, train_ids, steps, lr, seed)
            after.append(heldout_loss(model, heldout))
        for case, values in (("loss at the start", before), ("loss after training", after)):
            spread = statistics.pstdev(values)
            value = statistics.fmean(values)
            rows.append(
                {"case": case, "method": name, "value": value, "deviation": spread, **shared}
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Residuals layer by layer with their mean, then the losses."""
    columns = [(method, n) for method in METHODS for n in ITERATIONS]
    by_layer: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for row in rows:
        if row["case"] == "residual":
            place = by_layer.setdefault((row["weights"], row["layer"]), {})
            place[row["method"], row["iterations"]] = row["value"]
    for source in dict.fromkeys(source for source, _ in by_layer):
        found = [values for (name, _), values in by_layer.items() if name == source]
        by_layer[source, "MEAN"] = {c: statistics.fmean(v[c] for v in found) for c in columns}
    cells = [
        (source, layer, *(f"{values[column]:.4f}" for column in columns))
        for (source, layer), values in by_layer.items()
    ]
    heads = [f"{'NF4' if m == 'absmax' else 'search'}, {n}" for m, n in columns]
    text = format_table(cells, ("weights", "layer", *heads)) if cells else ""
    losses = {}
    for row in rows:
        if row["case"].startswith("loss"):
            losses.setdefault(row["method"], {})[row["case"]] = row
    lines = [
        (
            method,
            f"{found['loss at the start']['value']:.4f}",
            f"{found['loss after training']['value']:.4f} +- "
            f"{found['loss after training']['deviation']:.4f}"
            if "loss after training" in found
            else "",
        )
        for method, found in losses.items()
    ]
    headers = ("base and start", "held-out loss at the start", "after training")
    return f"{text}\n\n{format_table(lines, headers)}" if lines else text


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that the files at hand allow."""
    torch.set_num_threads(options.threads)
    rows = []
    for named in options.weights:
        name, _, file = named.partition("=")
        rows += residual_rows(name, linear_weights(Path(file)), options.rank)
    if options.stories is not None:
        weights = linear_weights(options.stories / "model.safetensors")
        rows += residual_rows("stories260K", weights, options.rank)
    if options.stories and options.train and options.heldout:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM, AutoTokenizer

        dense = AutoModelForCausalLM.from_pretrained(options.stories, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.stories)
        limit = dense.config.max_position_embeddings
        texts = [documents(f, tokenizer, limit) for f in (options.train, options.heldout)]
        settings = {"steps": options.steps, "lr": options.lr, "seeds": options.seeds}
        rows += loss_rows(dense, *texts, r=options.rank // 2, **settings)
    if not all(math.isfinite(row["value"]) for row in rows):
        msg = "a result is not finite"
        raise ArithmeticError(msg)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and with --save write results/loftq.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--stories", type=Path, help="directory of a small Llama")
    parser.add_argument("--train", type=Path, help="documents to train on")
    parser.add_argument("--heldout", type=Path, help="documents for the losses")
    parser.add_argument("--rank", type=int, default=16, help="of residuals; training takes half")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benches/results/loftq.json")
    options = parser.parse_args(arguments)
    rows = run(options)
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save('loftq', rows)}")


if __name__ == "__main__":
    main()
