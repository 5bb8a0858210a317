"""Eight blocks of Llama 8B with random weights, trained end to end: tokens/s and peak memory.

Grouped-query attention by torch's own, RMSNorm, rotary positions, SwiGLU; adapters of rank ``R``
on all linear layers, AdamW. Blocks are the same for every package, layers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_layers
import torch
from gpu_device import allocated, peak, random, release
from gpu_layers import Parts
from gpu_plan import Cell, R, Row, Run
from gpu_timing import (
    QUICK,
    Effort,
    Engine,
    absent,
    add_ratios,
    checked,
    interleaved,
    relative_error,
)
from gpu_weights import Workspace, bitsandbytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qkern

BASE, PEFT, OURS = "torch bf16 with LoRA", "PEFT + bitsandbytes", "qkern"
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = 0.1  # of the output: bf16, block upon block
# A measurement is a step or two; each package gets at least three.
EFFORT = Effort(repeats=12, min_time=0.0, budget=3.0)


@dataclass(frozen=True)
class Size:
    """Of the model and of a step."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    blocks: int = 8
    batch: int = 2
    length: int = 2048

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length


# Up to 4 tokens each value of h is a program of its own, which is slow to interpret.
TINY = Size(hidden=64, intermediate=64, heads=2, kv_heads=2, blocks=1, batch=1, length=5)


def cells(run: Run) -> Iterator[Cell]:
    """With checkpointing, as such models are trained; then without."""
    size = TINY if run.plan.quick else Size()
    for checkpointing, importance in ((True, 1), (False, 2))[: 1 if run.plan.quick else 2]:
        name = f"{size.blocks} blocks, checkpointing {'on' if checkpointing else 'off'}"
        work = partial(rows, run, size, checkpointing=checkpointing)
        yield Cell("model", name, importance, 45, work)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        width = size.hidden // size.heads
        linear = partial(nn.Linear, bias=False)
        self.q_proj = linear(size.hidden, size.hidden)
        self.k_proj = linear(size.hidden, size.kv_heads * width)
        self.v_proj = linear(size.hidden, size.kv_heads * width)
        self.o_proj = linear(size.hidden, size.hidden)
        self.gate_proj = linear(size.hidden, size.intermediate)
        self.up_proj = linear(size.hidden, size.intermediate)
        self.down_proj = linear(size.intermediate, size.hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(batch, length, hidden), and angles (length, width / 2)."""
        batch, length, hidden = x.shape
        normed = self.norms[0](x)

        def heads(projection: nn.Module, count: int) -> Tensor:
            return projection(normed).view(batch, length, count, -1).transpose(1, 2)

        q = rotated(heads(self.q_proj, self.heads), angles)
        k = rotated(heads(self.k_proj, self.kv_heads), angles)
        v = heads(self.v_proj, self.kv_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        normed = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of halves, turned by the position's angles."""
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class Blocks(nn.Module):
    """The model."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, self.checkpointing = size, False
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        pairs = self.size.hidden // self.size.heads // 2
        frequencies = 5e5 ** (-torch.arange(pairs, device=x.device) / pairs)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, angles, use_reentrant=False)
            else:
                x = block(x, angles)
        return x


def random_model(size: Size, device: torch.device) -> Blocks:
    """bf16, frozen, the same each time."""
    with torch.device("meta"):
        model = Blocks(size).to(torch.bfloat16)
    model.to_empty(device=device)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            generator = torch.Generator(device).manual_seed(i)
            parameter.data.normal_(std=0.02, generator=generator)
    return model.requires_grad_(False)


def replaced(model: Blocks, make: Callable[[nn.Linear], nn.Module]) -> Blocks:
    """The model with every linear layer made anew, one at a time."""
    for block in model.blocks:
        for name in NAMES:
            setattr(block, name, make(getattr(block, name)))
    return model


def with_qkern(model: Blocks) -> nn.Module:
    """As its users do."""
    qkern.quantize_model(model)
    qkern.add_lora(model, r=R, lora_alpha=gpu_layers.SCALING * R, dtype=torch.bfloat16)
    return model


def with_sequence(model: Blocks) -> nn.Module:
    """Unsloth's way with each layer; its functions for several at once are not rebuilt."""
    bitsandbytes()
    size = model.size
    device = next(model.parameters()).device
    workspace = Workspace(device, size.hidden * size.intermediate)
    return replaced(model, lambda old: gpu_layers.SequenceLinear(old.weight, workspace))


def with_peft(model: Blocks) -> nn.Module:
    """As its users do."""
    made = replaced(model, lambda old: gpu_layers.linear_4bit(old.weight))
    return gpu_layers.with_peft(made, list(NAMES))


WAYS: dict[str, Callable[[Blocks], nn.Module]] = {
    BASE: lambda model: replaced(model, gpu_layers.DenseLoRA),
    OURS: with_qkern,
}
PEERS = {"Unsloth sequence": with_sequence, PEFT: with_peft}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Those with adapters, in the order of the blocks."""
    blocks: Any = next(m for m in model.modules() if isinstance(m, Blocks)).blocks
    return [getattr(block, name) for block in blocks for name in NAMES]


def dense_output(model: nn.Module, x: Tensor, size: Size) -> Tensor:
    """What the model's own weights and adapters give in plain bf16 layers."""
    twin = random_model(size, x.device)
    layers = iter(layers_of(model))

    def make(_: nn.Linear) -> nn.Module:
        layer = next(layers)
        made = gpu_layers.DenseLoRA(gpu_layers.dense(Parts.weight_of(layer)))
        for new, old in zip(Parts.adapter_of(made), Parts.adapter_of(layer), strict=True):
            new.data.copy_(old.data)
        return made

    return replaced(twin, make)(x)


def trainer(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """One step: loss, gradients of the adapters, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=x.is_cuda)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = F.mse_loss(model(x).float(), target)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def made(name: str, run: Run, size: Size, *, checkpointing: bool) -> tuple[nn.Module, Row]:
    """A package's model, checked, with the memory that it takes by itself."""
    device, ways = run.plan.device, WAYS | PEERS
    before = allocated(device)
    model = ways[name](random_model(size, device)).train()
    release(device)
    weights = allocated(device) - before
    for seed, layer in enumerate(layers_of(model)):
        Parts.fill_adapter(layer, seed)
    few = random(1, min(64, size.length), size.hidden, device=device, seed=5).bfloat16()
    error = relative_error(model(few), dense_output(model, few, size))
    facts: Row = checked(name, {"error": error}, TOLERANCE)
    release(device)
    blocks: Any = next(m for m in model.modules() if isinstance(m, Blocks))
    blocks.checkpointing = checkpointing
    return model, facts | {"weights, bytes": weights, "before": before}


def rows(run: Run, size: Size, *, checkpointing: bool) -> Iterator[Row]:
    """All packages' models side by side in memory; steps in turn."""
    device = run.plan.device
    about = {"case": "training step", "dtype": "bf16", "M": size.tokens}
    about |= {"checkpointing": checkpointing, "blocks": size.blocks, "length": size.length}
    x = random(size.batch, size.length, size.hidden, device=device, seed=6).bfloat16()
    target = random(size.batch, size.length, size.hidden, device=device, seed=7)
    engines = []
    for name in (*WAYS, *(PEERS if run.plan.peers else ())):
        try:
            model, facts = made(name, run, size, checkpointing=checkpointing)
        except Exception as error:
            if name in WAYS:
                raise
            yield about | absent(name, error)
            continue
        step = trainer(model, x, target)
        facts["first loss"] = float(step())
        facts["peak, bytes"] = peak(device, step) - facts.pop("before")
        engines.append(Engine(name, [step], facts))
    rows = interleaved(engines, QUICK if run.plan.quick else EFFORT, device)
    add_ratios(rows, BASE, f"times faster than {BASE}")
    ours = next(row for row in rows if row["engine"] == OURS)
    for row in rows:
        row["tokens/s"] = size.tokens / row["median"]
        row["qkern is times faster"] = row["median"] / ours["median"]
        if row["peak, bytes"] > 0:
            row["qkern's share of peak"] = ours["peak, bytes"] / row["peak, bytes"]
        yield about | row
