"""A Llama of a billion parameters with random weights, for bench_cpu.py: decoding and training.

Everything is called without gradients; what needs them enables them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import limits
import torch
from cpu_engines import WrongResultError
from cpu_linear import TILES
from cpu_timing import Effort, Engine, add_ratios, interleaved, relative_error
from cpu_train import DenseLoRA, R, fill_adapter
from torch import Tensor, nn

import qkern

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the work."""

    hidden: int = 2048
    layers: int = 16
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32_000
    prompt: int = 16
    tokens: int = 8  # decoded in one measurement
    batch: int = 512  # tokens of a training step


REST = "limit: all but the layers"
# How the quantized layers multiply, as it stands in names; and how far the logits may be off, bf16
# and the layers' errors one upon the other.
COMPUTE = {"exact": "", "int8": ", int8 compute"}
TOLERANCES = {"exact": 0.1, "int8": 0.2}
TINY = Shape(64, 2, 128, 4, 2, 128, prompt=4, tokens=2, batch=8)


def llama(shape: Shape) -> Any:
    """transformers' Llama in bf16; Gaussian weights without the minutes of its own init."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn((1 << 22) + 3, generator=generator) * 0.02).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), values.numel()):
            piece = flat[start : start + values.numel()]
            piece.copy_(values[: piece.numel()])
    return model.eval().requires_grad_(False)


def quantized(model: nn.Module, *, head: bool = False, compute: str = "exact") -> Any:
    """A copy in NF4 with 8-bit scales; ``head``: the output head too."""
    done: Any = copy.deepcopy(model)
    qkern.quantize_model(done, compute=compute)
    if head:
        done.lm_head = qkern.QuantizedLinear.from_linear(done.lm_head, compute=compute)
    return done


def check(model: Any, done: Any, ids: Tensor, tolerance: float) -> float:
    """Distance of the logits from those of the dense model with the weights that ``done`` has.

    Raises:
        WrongResultError: if it is more than ``tolerance``.
    """
    dense = copy.deepcopy(model)
    for name, layer in done.named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            dense.get_submodule(name).weight.copy_(layer.quantized_weight.dequantize())
    error = relative_error(done(ids).logits, dense(ids).logits)
    if not error <= tolerance:
        msg = f"logits are {error:.2e} away from those of the dense twin, at most {tolerance}"
        raise WrongResultError(msg)
    return error


def decoder(model: Any, shape: Shape, ids: Tensor) -> Callable[[], Tensor]:
    """Greedy decoding of ``shape.tokens`` tokens, one at a time, after a prompt."""
    filled = model(ids, use_cache=True).past_key_values

    def run() -> Tensor:
        cache, token = copy.deepcopy(filled), ids[:, -1:]
        for _ in range(shape.tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return token

    return run


class Nothing(nn.Module):
    """In place of a linear layer: an output that is there already."""

    def __init__(self, layer: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.y = torch.zeros(1, tokens, layer.out_features, dtype=layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, in_features) to (1, tokens, out_features)."""
        return self.y[:, : x.shape[1]]


def without_layers(model: nn.Module, tokens: int) -> Any:
    """A copy whose linear layers, but the head, take no time: what is left of the model's own."""
    done: Any = copy.deepcopy(model)
    for name, layer in list(done.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            done.set_submodule(name, Nothing(layer, tokens))
    return done


def decode_rows(model: Any, shape: Shape, effort: Effort) -> Iterator[Row]:
    """Tokens a second of one sequence."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, shape.vocabulary, (1, shape.prompt), generator=generator)
    engines = [Engine("torch bf16", [decoder(model, shape, ids)])]
    rest = without_layers(model, shape.prompt)
    engines.append(Engine(REST, [decoder(rest, shape, ids)]))
    for compute, suffix in COMPUTE.items():
        for head in (False, True):
            done = quantized(model, head=head, compute=compute)
            facts = {"error": check(model, done, ids, TOLERANCES[compute])}
            name = f"qkern{suffix}{', output head too' if head else ''}"
            engines.append(Engine(name, [decoder(done, shape, ids)], facts))
    rows = interleaved(engines, effort)
    add_ratios(rows, "torch bf16", "times faster than torch bf16")
    for row in rows:
        row["tokens/s"] = shape.tokens / row["median"]
        yield {"case": "decode", "dtype": "bf16", **row}


def with_lora(model: Any) -> Any:
    """The unquantized model with bf16 adapters on every linear layer but the head, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            made = DenseLoRA(layer, layer.out_features, layer.in_features)
            model.set_submodule(name, made)
    return model


def trainer(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """One step: loss, gradients of the adapters, AdamW."""
    model.train()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            fill_adapter(layer)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss: Tensor = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def tiles_of(model: nn.Module, tokens: int) -> Callable[[], object]:
    """The tile instructions of a step: y and dX of every layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    products = [limits.multiplier(2 * tokens, *layer.weight.shape) for layer in layers]

    def run() -> None:
        for product in products:
            product()

    return run


def train_rows(model: Any, shape: Shape, effort: Effort) -> Iterator[Row]:
    """A step of one sequence; the unquantized model is changed."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, shape.vocabulary, (1, shape.batch), generator=generator)
    models = {}
    for compute, suffix in COMPUTE.items():
        done = models[f"qkern{suffix}"] = quantized(model, compute=compute)
        qkern.add_lora(done, r=R, lora_alpha=2 * R, dtype=torch.bfloat16)
    models["torch bf16"] = with_lora(model)  # the last, as it changes the model
    engines = []
    for name, trained in models.items():
        call = trainer(trained, ids)
        engines.append(Engine(name, [call], {"first loss": float(call())}))
    if limits.has_tiles():
        engines.append(Engine(TILES, [tiles_of(models["qkern"], shape.batch)]))
    rows = interleaved(engines, effort)
    add_ratios(rows, "torch bf16", "times faster than torch bf16")
    bound = next((row["median"] for row in rows if row["engine"] == TILES), None)
    for row in rows:
        if bound is not None and row["engine"] in {"qkern", "torch bf16"}:
            row["share of tiles"] = bound / row["median"]
        yield {"case": "training step", "dtype": "bf16", "M": shape.batch, **row}


def run(shape: Shape, effort: Effort) -> Iterator[Row]:
    """All rows of the section."""
    model = llama(shape)
    parameters = sum(p.numel() for p in model.parameters())
    for rows in (decode_rows(model, shape, effort), train_rows(model, shape, effort)):
        for row in rows:
            yield {**row, "parameters": parameters}
