"""``dX = sum over i of dY_i W_i + G A``: the gradient of an input that several layers share.

    dX (M, K) = dY_1 (M, N_1) W_1 (N_1, K) + ... + G (M, R) A (R, K)

G has the columns ``s_i dY_i B_i`` of all adapters side by side, A their rows. What ``projections``
is to forward: a program goes through the rows of one weight after the other, so that dX is written
once, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.errors import ShapeError
from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, lookup_of
from qkern.kernels.launch import Weight
from qkern.kernels.lora import add_parts, split_of
from qkern.kernels.matmul_backward import choose_backward
from qkern.kernels.members import check_weights
from qkern.kernels.product_backward import add_masked_adapter, sum_over_rows
from qkern.kernels.rounding import round_to
from qkern.kernels.thin_product import precision, precision_of

# Ranks that are multiplied at once: more take registers that the sums need.
_RANK_STEP = 16


@triton.jit
def _projections_backward_kernel(
    grads,
    packed,
    absmax,
    nested_absmax,
    offset,
    tables_ptr,
    G_ptr,
    A_ptr,
    dX_ptr,
    rows,
    M,
    K,
    split,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tiles_m = (M + BM - 1) // BM
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)  # (BM,)
    first = tl.program_id(0) // tiles_m * BK
    # Rows of all weights are numbered through: this program's, within the one at hand.
    start = tl.program_id(1) * split
    end = start + split
    sums = tl.full([BM, BK], 0.0, tl.float32)
    for i in tl.static_range(len(rows)):
        sums = sum_over_rows(
            sums,
            grads[i],
            packed[i],
            absmax[i],
            nested_absmax[i],
            offset[i],
            tables_ptr,
            m,
            first,
            M,
            rows[i],
            K,
            tl.maximum(start, 0),
            tl.minimum(end, rows[i]),
            BITS,
            BLOCKSIZE,
            DOUBLE_QUANT,
            LOOKUP,
            BK,
            BN,
            EVEN_K,
            AHEAD,
        )  # (BM, BK)
        start -= rows[i]
        end -= rows[i]
    if RANK > 0:  # noqa: SIM102 - known when compiled
        if tl.program_id(1) == 0:
            sums = add_masked_adapter(
                sums,
                G_ptr,
                A_ptr,
                G_ptr,
                m,
                first,
                M,
                K,
                0,
                1.0,
                RANK,
                BR,
                False,
                PRECISION,
                BK,
            )
    k = first + tl.arange(0, BK)  # (BK,)
    at = (tl.program_id(1).to(tl.int64) * M + m)[:, None] * K + k[None, :]  # (BM, BK)
    dX = round_to(sums, dX_ptr.dtype.element_ty)
    tl.store(dX_ptr + at, dX, mask=(m < M)[:, None] & (k < K)[None, :])


def projections_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Weight],
    G: Tensor | None = None,
    lora_A: Tensor | None = None,
) -> Tensor:
    """The gradient of the input, (..., K) in dY's dtype. Equal calls give equal bits.

    Args:
        grads: dY_i (..., N_i) each, of one dtype: fp32, fp16 or bf16.
        weights: (N_i, K) each, of ``launch.weight``, of one format.
        G: fp32 (M, R), of ``lora_backward.grad_hidden``, or None.
        lora_A: (R, K) in any of these dtypes, or None.

    Raises:
        ShapeError: for shapes that do not fit each other.
        DTypeError: for other dtypes.
        DeviceError: for tensors on several devices.
    """
    check_weights(weights)
    K, rows = weights[0].in_features, tuple(weight.out_features for weight in weights)
    flat = tuple(launch.operand(g, N, "grad") for g, N in zip(grads, rows, strict=True))
    grad, batch = flat[0], grads[0].shape[:-1]
    M, rank = grad.shape[0], 0
    if G is not None and lora_A is not None:
        lora_A = launch.operand(lora_A, K, "lora_A")
        rank = lora_A.shape[0]
        if G.shape != (M, rank):
            msg = f"G {tuple(G.shape)} must be (M, R) with M = {M}, R = {rank}"
            raise ShapeError(msg)
    present = [t for t in (G, lora_A) if t is not None]
    launch.same_device(*flat, *(weight.pointers[0] for weight in weights), *present)
    dX = torch.empty((M, K), dtype=grad.dtype, device=grad.device)
    if M == 0:
        return dX.reshape(*batch, K)
    config = choose_backward(M, grad.dtype, launch.arch(grad.device))
    tiles = triton.cdiv(M, config.BM) * triton.cdiv(K, config.BK)
    split = split_of(sum(rows), config.BN, tiles, grad.device)
    parts = triton.cdiv(sum(rows), split)
    out = dX
    if parts > 1:
        out = torch.empty((parts, M, K), dtype=torch.float32, device=grad.device)
    packed, absmax, nested, offset, tables = zip(*(w.pointers for w in weights), strict=True)
    with torch.cuda.device_of(grad):
        _projections_backward_kernel[(tiles, parts)](
            flat,
            packed,
            absmax,
            nested,
            offset,
            tables[0],
            grad if rank == 0 else G,
            grad if rank == 0 else lora_A,
            out,
            rows,
            M,
            K,
            split,
            EVEN_K=K % config.BK == 0,
            RANK=rank,
            BR=_RANK_STEP,
            PRECISION=precision(grad.device),
            num_warps=config.warps,
            num_stages=config.stages,
            **weights[0].constants,
            **config.constants,
            **launch.EXACT,
        )
        if parts > 1:
            add_parts(out, dX)
    return dX.reshape(*batch, K)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Three layers in NF4 and bf16, with every tile."""
    types = {"grads": "*bf16", "packed": "*u8", "absmax": "*u8", "rows": "i32"}
    types |= dict.fromkeys(("nested_absmax", "offset"), "*fp32")
    signature: dict[str, str | tuple[str, ...]] = {n: (each,) * 3 for n, each in types.items()}
    signature |= dict.fromkeys(("tables_ptr", "G_ptr", "A_ptr"), "*fp32")
    signature |= {"dX_ptr": "*bf16", "M": "i32", "K": "i32", "split": "i32"}
    for tokens in (16, 64, 512):
        config = choose_backward(tokens, torch.bfloat16, arch)
        constants = {
            "BITS": 4,
            "BLOCKSIZE": 64,
            "DOUBLE_QUANT": True,
            "LOOKUP": lookup_of(arch),
            "EVEN_K": True,
            "RANK": 48,
            "BR": _RANK_STEP,
            "PRECISION": precision_of(arch),
        }
        yield AotSpec(
            f"3 x matmul_backward {config.BM}x{config.BK}x{config.BN} nf4 of bf16, A fp32 r16",
            _projections_backward_kernel,
            signature,
            constants | config.constants,
            warps=config.warps,
            stages=config.stages,
            divisible=("K", "rows", "split"),
            tensor_cores=True,
        )
