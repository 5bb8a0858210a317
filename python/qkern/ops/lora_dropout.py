"""Dropout of an adapter's input: by the kernels that read it, or by torch.

A kernel computes the mask wherever it reads x, from a seed and the place, so no mask is stored.
The seed comes from the generator of x's device, as a tensor: ``torch.manual_seed`` repeats it,
checkpointing restores it, a CUDA graph draws a new one each time, and nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkern import kernels
from qkern.ops import device

_LARGEST_SEED = 2**63 - 1


def drops_in_kernel(x: Tensor) -> bool:
    """Whether kernels drop x by themselves: ``add_dropped`` is for where they do not."""
    return device.serves(x) and kernels.is_supported(x.device)


def draw_seed(x: Tensor) -> Tensor:
    """int64 (1,) on x's device, from its generator."""
    return torch.randint(_LARGEST_SEED, (1,), dtype=torch.int64, device=x.device)


def add_dropped(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """``y + scaling (dropout(x) A^T) B^T`` in y's dtype, by torch: a pass of its own over x and y.

    Args:
        y: (..., out_features).
        x: (..., in_features).
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: factor of the adapter's part.
        dropout: probability of 0.
    """
    dropped = torch.nn.functional.dropout(x.to(lora_A.dtype), dropout)
    h = torch.nn.functional.linear(dropped, lora_A)  # (..., r)
    return (y + torch.nn.functional.linear(h, lora_B) * scaling).to(y.dtype)
