"""``dX = dY W + s (dY B) A`` over a packed W: what ``linear`` is to forward.

dX (M, K), dY (M, N), W (N, K), B (N, r), A (r, K), s scaling
"""

from __future__ import annotations

from torch import Tensor

from qkern.errors import ShapeError
from qkern.kernels import launch
from qkern.kernels.dropout import Dropout
from qkern.kernels.launch import Weight
from qkern.kernels.lora import Rows, hidden
from qkern.kernels.matmul_backward import matmul_backward


def linear_backward(
    grad: Tensor,
    weight: Weight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    G: Tensor | None = None,
    rows: Rows | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """The gradient of the input; sums in fp32, rounded once. Equal calls give equal bits.

    Args:
        grad: dY (..., N) in fp32, fp16 or bf16.
        weight: (N, K), of ``launch.weight``.
        lora_A: (r, K) in any of these dtypes, or None.
        lora_B: (N, r) in any of these dtypes, or None.
        scaling: s, or fp32 (r,).
        G: fp32 (M, r) of ``lora_backward.grad_hidden`` if it is known; else a pass over dY.
        rows: the adapter of each token, if there are several.
        dropout: the same as forward's.

    Returns:
        (..., K) in dY's dtype.

    Raises:
        ShapeError: for shapes that do not fit each other.
        DTypeError: for other dtypes.
        DeviceError: for tensors on several devices.
    """
    N, K = weight.out_features, weight.in_features
    flat = launch.operand(grad, N, "grad")  # (M, N)
    if lora_A is None or lora_B is None:
        dX = matmul_backward(flat, weight)
        return dX.reshape(*grad.shape[:-1], K)
    if lora_A.shape != (lora_B.shape[-1], K) or lora_B.shape[0] != N:
        msg = (
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} must be (r, {K}) and"
            f" ({N}, r)"
        )
        raise ShapeError(msg)
    A = launch.operand(lora_A, K, "lora_A")
    launch.same_device(flat, weight.pointers[0], A, lora_B)
    if G is None:
        G = hidden(flat, launch.operand(lora_B.mT, N, "lora_B"), scaling, rows=rows)
    dX = matmul_backward(flat, weight, G, A, dropout=dropout)
    return dX.reshape(*grad.shape[:-1], K)
