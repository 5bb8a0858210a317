"""Every operation again in a few readable lines: the specification and the oracle of the tests.

Runs on any torch device. Slow on purpose: nothing here is blocked, fused or threaded. Devices that
have no kernels of their own use it as they are.

Shapes: ``n`` values, ``b = ceil(n / blocksize)`` blocks, ``g = ceil(b / 256)`` groups of scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qkern.errors import ShapeError
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code

# Below this, bitsandbytes' reciprocal would overflow: its floor for the block maximum.
ABSMAX_FLOOR = 1e-38
# Below this, the arithmetic of a search would be subnormal: such a block keeps its absmax.
SEARCHED_ABSMAX_FLOOR = 1e-36
# Below this, 127 / absmax is not finite in fp32: such an int8 block is stored as zeros.
INT8_ABSMAX_FLOOR = 1e-36


class Parts(NamedTuple):
    """The tensors of a quantized value; the last two are None with fp32 scales."""

    packed: Tensor  # uint8 (ceil(n / 2),) or int8 (n,)
    absmax: Tensor  # fp32 (b,), or uint8 codes (b,)
    nested_absmax: Tensor | None  # fp32 (g,)
    offset: Tensor | None  # fp32 (1,)


def quantize(values: Tensor, fmt: QuantFormat) -> Parts:
    """Codes and scales of ``values`` (any shape), chosen by the block maximum.

    Double quantization is applied as the format says, without asking whether it is safe
    (``scales_are_safe``).
    """
    encode = _encode_int8 if fmt.code is None else _encode_4bit
    packed, absmax = encode(values.detach().reshape(-1).float(), fmt)
    if not fmt.double_quant:
        return Parts(packed, absmax, None, None)
    return Parts(packed, *quantize_absmax(absmax))


def dequantize(parts: Parts, fmt: QuantFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """The ``numel`` values, flat: ``code * absmax`` in fp32, rounded once to ``dtype``."""
    absmax = parts.absmax.reshape(-1)
    if parts.nested_absmax is not None and parts.offset is not None:
        absmax = dequantize_absmax(absmax, parts.nested_absmax, parts.offset)
    packed = parts.packed.reshape(-1)
    if fmt.code is None:
        codes, step = packed.float(), absmax * absmax.new_tensor(1 / 127)
    else:
        index = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel]
        codes, step = _code_tensor(fmt, packed.device)[index.int()], absmax
    scales = step.repeat_interleave(fmt.blocksize)[:numel]  # (n,)
    return (codes * scales).to(dtype)


def search_scales(values: Tensor, fmt: QuantFormat, importance: Tensor | None = None) -> Tensor:
    """Scales (b,) of least squared error for 4-bit codes, of either sign.

    For a trial scale t, c are the table's values nearest to x / t. The best scale for these codes
    is ``sum(w x c) / sum(w c c)``, and ``sum(w x c)^2 / sum(w c c)`` what it explains of
    ``sum(w x x)``. Trials are multiples of the absmax. No block gets a larger error than by it.

    Args:
        values: any shape.
        fmt: a 4-bit format.
        importance: weights w, (columns,) of the last dimension, or None for ones.
    """
    x = values.detach().reshape(-1).float()
    absmax = _block_absmax(x, fmt.blocksize)  # (b,)
    usable = (absmax >= SEARCHED_ABSMAX_FLOOR) & absmax.isfinite()
    inverse = 1.0 / torch.where(usable, absmax, torch.ones_like(absmax))
    u = _blocks(x, fmt.blocksize) * torch.where(usable, inverse, 0.0)[:, None]  # (b, blocksize)
    ascending = torch.sort(_code_tensor(fmt, x.device)).values
    weights = None
    if importance is not None:
        weights = importance.to(x) / importance.max().clamp_min(torch.finfo(torch.float32).tiny)
    if weights is None or bool((weights == 1).all()):
        found, gains = _search_in_bytes(u, fmt, ascending)
    else:
        w = weights.expand(values.shape).reshape(-1) if values.dim() else weights.reshape(-1)
        w = _blocks(w, fmt.blocksize)  # (b, blocksize); 0 beyond the end
        found, gains = _search_weighted(u, w, fmt, ascending)
    scales = absmax * found
    fits = scales.abs() * ascending.abs().max() <= torch.finfo(values.dtype).max
    scales = torch.where(usable & gains & fits, scales, absmax)
    if x.numel() % fmt.blocksize:
        scales[-1] = _at_least_floor(scales[-1:])
    return scales


def _search_in_bytes(u: Tensor, fmt: QuantFormat, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (b,) of u (b, blocksize), and which of them are better than 1.

    Trials in integers: values times 127, c looked up by every second of these magnitudes. Then
    least squares once more, and the errors, in fp32.
    """
    q = (u.nan_to_num() * 127).round().int()
    slot = q.abs() // 2
    best = torch.stack([torch.ones_like(u[:, 0])] * 2 + [-torch.ones_like(u[:, 0])])  # (3, b)
    for trial in _byte_trials(fmt, ascending):
        above, below = (_looked_up(ascending, t) for t in (trial, -trial))
        c = torch.where(q < 0, below[slot], above[slot])
        qc = (q.abs() * c).sum(1).float() * math.copysign(1, trial)
        cc = (c * c).sum(1).float()
        better = qc * qc * best[1] > best[2] * cc
        best = torch.where(better, torch.stack([qc, cc, qc * qc]), best)
    found = best[0] / best[1]
    v = u * (1 / found)[:, None]
    c = _nearest(ascending, v)
    d = v - c
    more = (d * c).sum(1) / (c * c).sum(1)
    error = found * found * ((d * d).sum(1) - more * (d * c).sum(1))
    by_absmax = (u - _nearest(ascending, u)).square().sum(1)
    gains = error * (1 + 1 / 512) + fmt.blocksize * 1e-10 < by_absmax
    return found + found * more, gains


def _byte_trials(fmt: QuantFormat, ascending: Tensor) -> list[float]:
    """Twelve trial scales; magnitudes only where the table is symmetric."""
    if torch.equal(ascending, -ascending.flip(0)):
        return [
            [0.78, 0.82, 0.86, 0.9, 0.94, 0.98, 1.04, 1.14, 1.28, 1.34, 1.4, 1.46],
            [0.66, 0.72, 0.76, 0.78, 0.8, 0.82, 0.86, 0.9, 0.96, 1.34, 1.4, 1.52],
            [0.5, 0.54, 0.58, 0.64, 0.66, 0.7, 0.74, 0.78, 0.84, 0.88, 1.36, 1.52],
        ][sum(fmt.blocksize > largest for largest in (128, 512))]
    multiples = [
        [0.9, 0.96, 1.02, 1.08, 1.3, 1.38],
        [0.86, 0.92, 0.98, 1.02, 1.06, 1.32],
        [0.8, 0.86, 0.9, 0.94, 1.02, 1.3],
        [0.62, 0.7, 0.76, 0.82, 0.9, 1.3],
    ][sum(fmt.blocksize > largest for largest in (64, 128, 512))]
    return [sign * multiple for multiple in multiples for sign in (1, -1)]


def _looked_up(ascending: Tensor, trial: float) -> Tensor:
    """127 |c| (64,) of values 0 and ``(2 i + 0.5) / 127``; of four in a row at most two differ."""
    u = (2 * torch.arange(64, device=ascending.device) + 0.5) / 127 / trial
    u[0] = 0
    bins = (_nearest(ascending, u) * 127).abs().round().int().reshape(-1, 4)
    low, high = bins[:, :1], bins[:, 3:]
    return torch.where((bins == low) | (bins - low < high - bins), low, high).reshape(-1)


def _nearest(ascending: Tensor, u: Tensor) -> Tensor:
    bounds = (ascending[:-1] + ascending[1:]) / 2
    return ascending[torch.bucketize(u.clamp(-1, 1), bounds)]


def _search_weighted(
    u: Tensor, w: Tensor, fmt: QuantFormat, ascending: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``_search_in_bytes``, in fp32 with weights w (b, blocksize): eight trials, four nearby."""

    def compare(best: Tensor, trial: Tensor) -> Tensor:  # (3, b), (b,) or (1,) to (3, b)
        c = _nearest(ascending, u / trial[:, None])
        xc, cc = (w * u * c).sum(1), (w * c * c).sum(1)
        found = torch.stack([xc * xc / cc, trial.expand_as(xc), xc / cc])
        return torch.where(found[0] > best[0], found, best)

    one = torch.ones_like(u[:, 0])
    best = torch.stack([-torch.inf * one, one, one])
    for multiple in _trials(fmt, ascending):
        best = compare(best, u.new_tensor([multiple]))
    middle = best[1]
    for near in (1.02, 0.98, 1.04, 0.96):
        best = compare(best, middle * near)
    c = _nearest(ascending, u)
    explained = (w * (2 * u - c) * c).sum(1)  # by the absmax itself
    return best[2], best[0] - explained > 1e-5 * (w * c * c).sum(1)


def _trials(fmt: QuantFormat, ascending: Tensor) -> tuple[float, ...]:
    """The first trials with weights, multiples of the absmax; no sign if the table is symmetric."""
    small = fmt.blocksize <= 128
    if torch.equal(ascending, -ascending.flip(0)):
        if small:
            return (1.0, 0.82, 0.88, 0.94, 0.85, 0.91, 1.06, 1.36)
        return (1.0, 0.64, 0.7, 0.76, 0.8, 0.84, 0.88, 0.94)
    multiples = (1.0, 0.9, 1.07, 1.36) if small else (1.0, 0.8, 0.87, 0.94)
    return multiples + tuple(-multiple for multiple in multiples)


def encode(values: Tensor, scales: Tensor, fmt: QuantFormat) -> Tensor:
    """Packed 4-bit codes of ``values`` (any shape) against scales (b,) of either sign."""
    x = values.detach().reshape(-1).float()
    full = x.numel() // fmt.blocksize * fmt.blocksize
    divisor = _at_least_floor(scales)
    scaled = x * (1.0 / divisor).repeat_interleave(fmt.blocksize)[: x.numel()]
    if full < x.numel():
        scaled[full:] = x[full:] / divisor[-1]
    return _pack_nearest(scaled, fmt)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes (b,), group maxima (g,) and offset (1,) of fp32 scales (b,).

    The offset is their mean, or 0 if one is negative: scales of both signs lie around it.
    """
    groups = _blocks(absmax.double(), NESTED_BLOCKSIZE)
    # Summed group by group in fp64: the same mean for any number of threads.
    total = sum((group.sum() for group in groups), start=groups.new_zeros(()))
    offset = (total / max(absmax.numel(), 1)).float().reshape(1)
    offset = torch.where((absmax < 0).any(), torch.zeros_like(offset), offset)
    residual = absmax - offset
    nested = _block_absmax(residual, NESTED_BLOCKSIZE)
    scale = nested.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    scaled = torch.where(scale == 0, torch.zeros_like(scale), residual / scale)
    code = torch.tensor(dynamic_code(), dtype=torch.float32, device=absmax.device)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8), nested, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales (b,) of 8-bit codes: ``code * nested_absmax``, then ``+ offset``."""
    code = torch.tensor(dynamic_code(), dtype=torch.float32, device=codes.device)
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return code[codes.int()] * scale + offset


def scales_are_safe(absmax: Tensor, decoded: Tensor) -> bool:
    """Whether each scale that is not 0 kept its sign and lies within 1/8 of what it was."""
    kept = (absmax.sign() == decoded.sign()) & ((decoded - absmax).abs() <= absmax.abs() / 8)
    return bool((kept | (absmax == 0)).all())


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``, in x's dtype; the adapter's part in fp32 or more.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), dequantized to x's dtype.
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
    """
    y = torch.nn.functional.linear(x, weight, bias)  # (..., out_features)
    if lora_A is None or lora_B is None:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) @ lora_A.to(wide).mT  # (..., r)
    return (y + (h @ lora_B.to(wide).mT) * scaling).to(x.dtype)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    transposed: bool = False,
) -> Tensor:
    """``linear`` by the expert of each row; (M, N) in x's dtype, zeros behind the last offset.

    Args:
        x: (M, K), rows sorted by expert.
        weight: (E, N, K), or (E, K, N) if ``transposed``; dequantized to x's dtype.
        offsets: (E,) integers: where each expert's rows end.
        bias: (E, N) or None.
        lora_A: (E, r, K) or None.
        lora_B: (E, N, r) or None.
        scaling: factor of the adapters' part.
        transposed: which of the two the weight is.

    Raises:
        ShapeError: if offsets fall, or leave the rows.
    """
    pieces, last = [], 0
    for e, first, last in spans(offsets, x.shape[0]):
        W = weight[e].mT if transposed else weight[e]  # (N, K)
        b, A, B = (None if t is None else t[e] for t in (bias, lora_A, lora_B))
        pieces.append(linear(x[first:last], W, b, A, B, scaling))
    columns = weight.shape[2 if transposed else 1]
    behind = (pieces[0] if pieces else x).new_zeros(x.shape[0] - last, columns)
    return torch.cat([*pieces, behind])


def spans(offsets: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Each expert, its first row, and the one behind its last.

    Args:
        offsets: (E,) integers: where each expert's rows end.
        rows: how many there are.

    Raises:
        ShapeError: if offsets fall, or leave the rows.
    """
    first = 0
    for expert, last in enumerate(offsets.tolist()):
        if not first <= last <= rows:
            msg = f"offsets[{expert}] is {last}: {first} to {rows} is needed"
            raise ShapeError(msg)
        yield expert, first, last
        first = last


def _encode_4bit(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    absmax = _block_absmax(x, fmt.blocksize)
    full = x.numel() // fmt.blocksize * fmt.blocksize
    inverse = (1.0 / absmax.clamp_min(ABSMAX_FLOOR)).repeat_interleave(fmt.blocksize)
    scaled = x * inverse[: x.numel()]
    if full < x.numel():  # the ragged last block divides instead, as bitsandbytes does
        absmax[-1] = absmax[-1].clamp_min(ABSMAX_FLOOR)
        scaled[full:] = x[full:] / absmax[-1]
    return _pack_nearest(scaled, fmt), absmax


def _pack_nearest(scaled: Tensor, fmt: QuantFormat) -> Tensor:
    """Two codes a byte of the values nearest to ``scaled`` (n,), clamped to [-1, 1]."""
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = _code_tensor(fmt, scaled.device)
    ascending, order = torch.sort(code, stable=True)
    # A value equal to a midpoint takes the lower code.
    index = torch.bucketize(scaled.clamp(-1, 1), (ascending[:-1] + ascending[1:]) / 2)
    nibble = order[index].to(torch.uint8)
    return (nibble[0::2] << 4) | nibble[1::2]


def _at_least_floor(scales: Tensor) -> Tensor:
    """Scales of magnitude ``ABSMAX_FLOOR`` or more, with their signs."""
    floor = torch.full_like(scales, ABSMAX_FLOOR).copysign(scales)
    return torch.where(scales.abs() < ABSMAX_FLOOR, floor, scales)


def _encode_int8(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    absmax = _block_absmax(x, fmt.blocksize)
    if fmt.kind.per_row:  # bitsandbytes' factor: now and then an ulp off the quotient
        factor = 127.0 * absmax.reciprocal()
    else:  # torch computes 127 / t as 127 * (1 / t); two tensors are divided for real
        factor = torch.full_like(absmax, 127.0) / absmax
    factor[absmax < INT8_ABSMAX_FLOOR] = 0.0
    scaled = x * factor.repeat_interleave(fmt.blocksize)[: x.numel()]
    return scaled.round().clamp(-127, 127).to(torch.int8), absmax


def _blocks(x: Tensor, blocksize: int) -> Tensor:
    """``x`` (n,) as rows of a block each, the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % blocksize)).reshape(-1, blocksize)


def _block_absmax(x: Tensor, blocksize: int) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(0)
    return _blocks(x, blocksize).abs().amax(dim=1)


def _code_tensor(fmt: QuantFormat, device: torch.device) -> Tensor:
    return torch.tensor(fmt.code, dtype=torch.float32, device=device)
