"""Where an adapter starts, taken from its layer's weight.

    W dense, Q quantized, s the scaling, rank(M, r) the nearest matrix of rank r to M

    loftq    s B A = rank(W - Q, r), then Q = quantize(W - s B A), and again
    pissa    s B A = rank(W, r),     then Q = quantize(W - s B A)
    olora    W = O R,  B = O[:, :r],  A = R[:r],  then Q = quantize(W - s B A)

LoftQ: Li et al., https://arxiv.org/abs/2310.08659; PiSSA: Meng et al.,
https://arxiv.org/abs/2404.02948; OLoRA: Buyukakyuz, https://arxiv.org/abs/2406.01775.

``rank`` is a randomized SVD (Halko et al., https://arxiv.org/abs/0909.4061) by a generator of its
own: the same on every run.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from qkern.errors import AdapterMismatchError, DeviceError, FormatError
from qkern.tensor import QuantizedTensor

# Rows more than r that the randomized SVD samples, and how often it multiplies by M M^T.
_MORE: Final = 16
NITER: Final = 8
_SEED: Final = 0
# A weight further away than this, by its own norm, is not the one that was quantized.
_FAR: Final = 0.5


class Start(NamedTuple):
    """Where an adapter starts.

    Args:
        A: fp32 (r, in_features).
        B: fp32 (out_features, r).
        weight: the base that goes with it; None if it stays as it is.
    """

    A: Tensor
    B: Tensor
    weight: QuantizedTensor | None


def check_init(init_lora_weights: bool | str, *, has_dense: bool, iterations: int) -> int:  # noqa: FBT001
    """How an initialization by name is computed: the products of its SVD.

    Raises:
        FormatError: for an unknown one, LoftQ without the dense weight, or a number of iterations
            below 0.
    """
    name, _, niter = str(init_lora_weights).partition("_niter_")
    known = init_lora_weights in ("loftq", "pissa", "olora") or (
        name == "pissa" and niter.isdigit()
    )
    if not known:
        msg = (
            f"init_lora_weights is {init_lora_weights!r}: known are True, False, 'gaussian', "
            "'loftq', 'pissa', 'pissa_niter_N' and 'olora'"
        )
        raise FormatError(msg)
    if name == "loftq" and not has_dense:
        msg = (
            "LoftQ needs the weights of before quantization: pass dense=, the dense model, its "
            "state dict, or a directory of safetensors"
        )
        raise FormatError(msg)
    if iterations < 0:
        msg = f"loftq_iterations must be 0 or more, got {iterations}"
        raise FormatError(msg)
    return int(niter) if niter else NITER


def start_from_weight(
    init_lora_weights: str,
    weight: QuantizedTensor,
    dense: Tensor | None,
    *,
    r: int,
    scaling: float,
    iterations: int = 1,
    method: str = "absmax",
) -> Start | None:
    """Where an adapter starts by its layer's weight.

    LoftQ keeps the best of its iterations, so that more are never worse.

    Args:
        init_lora_weights: "loftq", "pissa", "pissa_niter_N" or "olora".
        weight: (out_features, in_features).
        dense: what ``weight`` was quantized from; None for its own values, which LoftQ cannot use.
        r: rank.
        scaling: of ``B A``.
        iterations: of LoftQ, 0 or more.
        method: how the base is quantized again, see ``qkern.quantize``.

    Returns:
        None for LoftQ of no iteration.

    Raises:
        FormatError: as ``check_init``, for a scaling that is not positive, and for a rank above the
            weight's.
        AdapterMismatchError: if ``dense`` is of another layer.
        DeviceError: if one of them is on meta.
    """
    niter = check_init(init_lora_weights, has_dense=dense is not None, iterations=iterations)
    if not scaling > 0 or r > min(weight.shape):
        msg = (
            f"init_lora_weights={init_lora_weights!r} needs a positive scaling, got {scaling}, and "
            f"a rank of at most {min(weight.shape)}, got {r}"
        )
        raise FormatError(msg)
    if weight.is_meta or (dense is not None and dense.is_meta):
        msg = (
            f"init_lora_weights={init_lora_weights!r} needs the values of the weight, which is on "
            "meta: load the model first"
        )
        raise DeviceError(msg)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        W = weight.dequantize(torch.float32)
        if dense is not None:
            W = _checked(dense.detach().to(W.device, torch.float32), W)
        if init_lora_weights == "loftq":
            return _loftq(W, weight, r, scaling, iterations, method)
        if init_lora_weights == "olora":
            Q, R = torch.linalg.qr(W)
            A, B = R[:r].contiguous(), Q[:, :r].contiguous()
        else:
            A, B = low_rank(W, r, scaling, niter=niter)
        return Start(A, B, _quantize(W - scaling * (B @ A), weight, method))


def low_rank(M: Tensor, r: int, scaling: float, *, niter: int = NITER) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) of equal parts, so that ``scaling B A`` is about ``rank(M, r)``.

    Args:
        M: fp32 (N, K).
        r: rank.
        scaling: of ``B A``.
        niter: products by ``M M^T``.
    """
    size = min(M.shape)
    if r + _MORE >= size:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        V = Vh.mT
    else:
        U, S, V = _sampled_svd(M, r + _MORE, niter)
    root = (S[:r] / scaling).sqrt()  # (r,)
    return (V[:, :r] * root).mT.contiguous(), U[:, :r] * root


def _sampled_svd(M: Tensor, size: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values of M: U (N, size), S (size,), V (K, size).

    As ``torch.svd_lowrank``, but for the generator: that draws from the user's, on M's device.
    """
    wide = M.shape[0] < M.shape[1]
    tall = M.mT if wide else M
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(tall.shape[1], size, generator=generator, device="cpu").to(M.device)
    Q = torch.linalg.qr(tall @ start).Q
    for _ in range(niter):
        Q = torch.linalg.qr(tall.mT @ Q).Q
        Q = torch.linalg.qr(tall @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ tall, full_matrices=False)
    U, V = Q @ U, Vh.mT
    return (V, S, U) if wide else (U, S, V)


def _loftq(
    W: Tensor, weight: QuantizedTensor, r: int, scaling: float, iterations: int, method: str
) -> Start | None:
    best, least, base = None, torch.inf, weight
    product = torch.zeros_like(W)
    for iteration in range(iterations):
        if iteration:
            base = _quantize(W - product, weight, method)
        residual = W - base.dequantize(torch.float32)
        A, B = low_rank(residual, r, scaling)
        product = scaling * (B @ A)
        error = (residual - product).norm().item()
        if best is None or error < least:
            best, least = Start(A, B, base if iteration else None), error
    return best


def _quantize(values: Tensor, like: QuantizedTensor, method: str) -> QuantizedTensor:
    return QuantizedTensor.from_dense(values.to(like.dtype), like.format.template, method=method)


def _checked(dense: Tensor, W: Tensor) -> Tensor:
    if dense.shape != W.shape:
        msg = f"the dense weight is {tuple(dense.shape)}, the layer's {tuple(W.shape)}"
        raise AdapterMismatchError(msg)
    distance = (dense - W).norm() / dense.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if not distance <= _FAR:
        msg = (
            f"the dense weight is not what this layer was quantized from: they differ by "
            f"{float(distance):.0%} of its norm"
        )
        raise AdapterMismatchError(msg)
    return dense
