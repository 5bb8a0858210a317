"""Small dense model directories, and what their quantized copies must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import write, write_shards
from safetensors.torch import load_file
from torch import Tensor

import qkern
from qkern import flat_keys
from qkern.checkpoint.quantization_report import QuantizationReport, TensorResult

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 96,
    "dtype": "bfloat16",
}
# Each with settings of its own: scales in 8 bits and in fp32, other blocks, a search.
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": False, "blocksize": 128}),
    ("nf4", {"method": "search"}),
    ("fp4", {"blocksize": 32}),
    ("int8", {}),
    ("int8", {"double_quant": False}),
    ("int8_row", {}),
]


def layer(index: int, dtype: torch.dtype = torch.bfloat16, *, width: int = 64) -> dict[str, Tensor]:
    """The weights of one block of a model."""
    prefix = f"model.layers.{index}"
    return {
        f"{prefix}.self_attn.q_proj.weight": torch.randn(width, width).to(dtype),
        f"{prefix}.mlp.down_proj.weight": torch.randn(width, 3 * width).to(dtype),
        f"{prefix}.mlp.down_proj.bias": torch.randn(width).to(dtype),
        f"{prefix}.input_layernorm.weight": torch.ones(width).to(dtype),
    }


def ends() -> dict[str, Tensor]:
    """Embeddings, output head and last norm."""
    return {
        "model.embed_tokens.weight": torch.randn(96, 64).bfloat16(),
        "lm_head.weight": torch.randn(96, 64).bfloat16(),
        "model.norm.weight": torch.ones(64),
    }


def write_model(
    path: Path, *shards: dict[str, Tensor], config: dict[str, Any] | None = None
) -> Path:
    """A model directory of one file or several, with the small files that belong to it."""
    write(path, shards[0]) if len(shards) == 1 else write_shards(path, *shards)
    (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return path


def write_sharded(path: Path) -> Path:
    """Two shards of two blocks, with odd sizes, an empty tensor and integers among them."""
    odd = {
        "model.odd.weight": torch.randn(7, 33),
        "model.counts": torch.arange(5),
        "model.mask": torch.tensor([True, False, True]),
        "model.empty": torch.empty(0, 4),
        "model.half": torch.randn(3).half(),
    }
    return write_model(path, ends() | layer(0) | odd, layer(1, torch.float16) | layer(2))


def expected_entries(
    dense: dict[str, Tensor], names: set[str], quant_type: str, **settings: Any
) -> dict[str, Tensor]:
    """Entries of a file in which the tensors ``names`` are quantized."""
    entries: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        if name in names:
            entries |= flat_keys.flatten(qkern.quantize(tensor, quant_type, **settings), name)
        else:
            entries[name] = tensor
    return entries


def row(report: QuantizationReport, name: str) -> TensorResult:
    return next(row for row in report.tensors if row.name == name)


def entries_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
