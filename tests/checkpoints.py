"""Checkpoints that the tests of an inspection write, and how they look at its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qkern.checkpoint.inspection_report import InspectionReport
from qkern.checkpoint.tensor_report import TensorReport


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A model directory, or a file if the path has a suffix."""
    file = path if path.suffix else path / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    return path


def write_shards(path: Path, *shards: dict[str, Tensor]) -> Path:
    weight_map = {}
    for i, shard in enumerate(shards):
        file = write(path / f"model-{i}.safetensors", shard)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def row(report: InspectionReport, name: str = "w.weight") -> TensorReport:
    return next(row for row in report.tensors if row.name == name)


def strict_json(report: InspectionReport) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    return content


def block_errors(got: Tensor, expected: Tensor, blocksize: int) -> Tensor:
    """Relative RMS error of each block, fp64, by plain torch."""
    missing = -expected.numel() % blocksize
    error, reference = (
        torch.cat([t.double().reshape(-1), torch.zeros(missing, dtype=torch.float64)])
        for t in (got.double() - expected.double(), expected)
    )
    norms = [t.reshape(-1, blocksize).norm(dim=1) for t in (error, reference)]
    return norms[0] / norms[1]
