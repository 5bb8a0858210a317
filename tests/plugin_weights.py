"""Weights as bitsandbytes packs them, and the values that they decode to."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnbf


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest relative error of a product, by the dtype of its inputs: a few of its roundings.
NEAR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def scaled(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values whose scale differs much between neighbours: wrong scales show."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def decoded(packed: Tensor, state: bnbf.QuantState, dtype: torch.dtype) -> Tensor:
    """``code * absmax`` in fp32, rounded once: what a weight is."""
    shape, absmax = torch.Size(state.shape), state.absmax
    if state.nested:
        groups = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * groups + state.offset
    codes = packed.reshape(-1).view(torch.uint8)
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[: shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: shape.numel()]
    return (state.code[nibbles.long()] * scales).reshape(shape).to(dtype)


def quantized(w: Tensor, **settings: Any) -> tuple[Tensor, bnbf.QuantState]:
    settings = {"quant_type": "nf4", "blocksize": 64} | settings
    packed, state = bnbf.quantize_4bit(w, **settings)
    return packed, state


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: object) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, (where, key)
        assert ours[key].shape == value.shape, (where, key)
        assert bytes_of(ours[key]) == bytes_of(value), (where, key)


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def relative(result: Tensor, expected: Tensor) -> float:
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).norm() / expected.norm())


def linear4bit(in_features: int, out_features: int, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"quant_type": "nf4"} | settings
    layer = bnb.nn.Linear4bit(in_features, out_features, **settings)
    layer.weight.data.copy_(scaled(out_features, in_features))
    return layer.to("cpu")
