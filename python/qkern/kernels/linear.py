"""``y = x W^T + h B^T + bias`` over a packed W, by the kernel that serves its shape.

    y (M, N), x (M, K), W (N, K), h = s x A^T (M, r), B (N, r), bias (N,)

M tokens, N out_features, K in_features, r rank, s scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import ShapeError
from qkern.kernels import launch
from qkern.kernels.dispatch import Config, choose
from qkern.kernels.launch import Weight
from qkern.kernels.matmul import matmul
from qkern.kernels.matmul_small import matmul_small
from qkern.kernels.matvec import matvec
from qkern.kernels.tune import tuned_of

KERNELS = {"matvec": matvec, "matmul_small": matmul_small, "matmul": matmul}


def config_for(
    device: torch.device, dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> Config | None:
    """How a product runs; None where a dense copy of the weight is better, or no kernel serves."""
    if dtype not in launch.TL_DTYPES:
        return None
    processors, bits = launch.processors(device), dtype.itemsize * 8
    tuned = tuned_of(device)
    return choose(launch.arch(device), processors, bits, tokens, out_features, in_features, tuned)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """The product; sums in fp32, rounded once to x's dtype. Equal calls give equal bits.

    Args:
        x: (..., K) in fp32, fp16 or bf16.
        weight: (N, K), of ``launch.weight``.
        bias: (N,) in any of these dtypes, or None.
        h: (..., r), ``scaling * (x A^T)`` in any of these dtypes, or None.
        lora_B: (N, r) in any of these dtypes, or None.
        config: how to run; by default ``config_for``.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ShapeError: for shapes that do not fit each other, or a product that no config serves.
        DTypeError: for other dtypes.
        DeviceError: for tensors on several devices.
    """
    N, K = weight.out_features, weight.in_features
    rows = launch.operand(x, K, "x")  # (M, K)
    M = rows.shape[0]
    if lora_B is not None and h is not None:
        rank = lora_B.shape[-1]
        lora_B = launch.operand(lora_B, rank, "lora_B")
        h = launch.operand(h, rank, "h")
        if (h.shape[0], lora_B.shape[0]) != (M, N):
            msg = (
                f"h {tuple(h.shape)} and lora_B {tuple(lora_B.shape)} must be (M, r) and (N, r)"
                f" with M = {M}, N = {N}"
            )
            raise ShapeError(msg)
        if rank == 0:
            h = lora_B = None
    if bias is not None:
        bias = launch.operand(bias, N, "bias")
    present = [t for t in (bias, h, lora_B) if t is not None]
    launch.same_device(rows, weight.pointers[0], *present)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M > 0:
        config = config or config_for(x.device, x.dtype, M, N, K)
        if config is None:
            msg = f"no kernel multiplies {M} tokens of {x.dtype}: dequantize the weight instead"
            raise ShapeError(msg)
        config = config.for_codes(weight.fmt.bits)
        KERNELS[config.op](rows, weight, bias, h, lora_B, config, out)
    return out.reshape(*x.shape[:-1], N)
