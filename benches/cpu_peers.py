"""Other packages' linear layers for bench_cpu.py; ``requirements-peers.txt`` installs them.

Each builder raises what its package raises where it cannot run: the bench lists that as the reason.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cpu_engines import Builder, Linear
from cpu_timing import Effort
from torch import Tensor, nn

SLOW_COPIES = 4  # of layers that make a dense weight at each call: far from the speed of memory


def _dense_layer(w: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.to(dtype, copy=True), requires_grad=False)
    return layer


def with_bitsandbytes(w: Tensor, effort: Effort, *, packed_for_eval: bool) -> Linear:
    """``matmul_4bit``, NF4, blocks of 64, nested, bf16.

    As ``Linear4bit`` calls it in eval mode (AVX512-BF16 kernel on a repacked weight) or in training
    (dequantize, then torch's linear).
    """
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").train(not packed_for_eval)
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if packed_for_eval:
        with torch.no_grad():  # the first call repacks
            layer(torch.zeros(1, w.shape[1], dtype=torch.bfloat16))
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            msg = "this version or processor has no repacked path"
            raise NotImplementedError(msg)
    data, state = layer.weight.data, layer.weight.quant_state
    weights = [(data.clone(), copy.deepcopy(state)) for _ in range(effort.copies(w.numel() // 2))]
    kind = "eval" if packed_for_eval else "train"
    return Linear(
        f"bitsandbytes {kind}",
        weights,
        lambda pair, x: bnb.matmul_4bit(x, pair[0], quant_state=pair[1]),
        dense,
        torch.bfloat16,
        2e-2,
        slow_above=512,
    )


def with_torchao_int4(w: Tensor, effort: Effort) -> Linear:
    """Int4 weight-only in its CPU layout, groups of 64, bf16."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    def make() -> Tensor:
        q: Tensor = Int4OpaqueTensor.from_hp(w.bfloat16(), [1, 64])
        return q

    first = make()
    eye = torch.eye(w.shape[1], dtype=torch.bfloat16)
    dense = _linear(first, eye).float().mT.contiguous()  # it has no dequantize
    weights = [first, *(make() for _ in range(effort.copies(w.numel() // 2) - 1))]
    return Linear("torchao int4", weights, _linear, dense, torch.bfloat16, 2e-2, slow_above=512)


def with_torchao_int4_compiled(w: Tensor, effort: Effort) -> Linear:
    """The same weight by ``torch.compile``, which has AMX kernels for it; compiled anew for each M.

    The weight must be a constant of the compiled code: hence few copies, and few M.
    """
    from torch._inductor import config
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    q = Int4OpaqueTensor.from_hp(w.bfloat16(), [1, 64])
    dense = _linear(q, torch.eye(w.shape[1], dtype=torch.bfloat16)).float().mT.contiguous()

    def bind(x: Tensor) -> tuple[list[Callable[[], Any]], Callable[[], Tensor]]:
        torch._dynamo.reset()
        options = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
        calls = []
        with config.patch(freezing=True, **options), contextlib.redirect_stderr(io.StringIO()):
            for _ in range(min(SLOW_COPIES, effort.copies(w.numel() // 2))):
                layer = torch.compile(_Int4(q.qdata.clone(), q.scale_and_zero.clone()))
                layer(x)
                calls.append(partial(layer, x))
        return calls, calls[-1]

    return Linear(
        "torchao int4, compiled",
        [],
        _linear,
        dense,
        torch.bfloat16,
        2e-2,
        only=(8, 32, 512),
        bind_with=bind,
    )


class _Int4(nn.Module):
    """torch's product with an int4 weight in groups of 64."""

    def __init__(self, packed: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, 64, self.scales)
        return y


def with_torchao_int4_int8(w: Tensor, effort: Effort) -> Linear:
    """Int4 weights, int8 activations by row: the C++ kernels with AMX, where a build has them."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    q = Int4OpaqueTensor.from_hp_da8w4(w.bfloat16(), 64)
    eye = torch.eye(w.shape[1], dtype=torch.bfloat16)
    dense = _linear(q, eye).float().mT.contiguous()
    weights = [q, *(copy.deepcopy(q) for _ in range(effort.copies(w.numel() // 2) - 1))]
    return Linear("torchao int4, int8 activations", weights, _linear, dense, torch.bfloat16, 5e-2)


def with_torchao_int8(w: Tensor, effort: Effort, *, dynamic: bool) -> Linear:
    """Int8 weights by row, bf16; ``dynamic``: activations in int8 by row too."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    layer = _dense_layer(w, torch.bfloat16)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
    q = layer.weight
    weights = [layer, *(copy.deepcopy(layer) for _ in range(effort.copies(w.numel()) - 1))]
    name = "torchao int8, int8 activations" if dynamic else "torchao int8"
    dense = q.dequantize().float()
    return Linear(name, weights, nn.Module.__call__, dense, torch.bfloat16, 5e-2)


def with_hqq(w: Tensor, effort: Effort) -> Linear:
    """4 bits, groups of 64, bf16, without the optimizer of its scales (the same speed)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    config["weight_quant_params"]["optimize"] = False
    layer = HQQLinear(
        _dense_layer(w, torch.bfloat16), config, compute_dtype=torch.bfloat16, device="cpu"
    )
    weights = [layer] * min(SLOW_COPIES, effort.copies(w.numel() // 2))
    dense = layer.dequantize().float()
    return Linear("HQQ", weights, lambda m, x: m(x), dense, torch.bfloat16, 2e-2)


def with_quanto(w: Tensor, effort: Effort, *, bits: int) -> Linear:
    """optimum-quanto's ``QLinear``, weights only, bf16."""
    from optimum.quanto import QLinear, qint4, qint8

    kind = {4: qint4, 8: qint8}[bits]
    weights = []
    for _ in range(min(SLOW_COPIES, effort.copies(w.numel() * bits // 8))):
        weights.append(QLinear.from_module(_dense_layer(w, torch.bfloat16), weights=kind))
        weights[-1].freeze()
    dense = weights[0].qweight.dequantize().float()
    return Linear(
        f"optimum-quanto qint{bits}",
        weights,
        nn.Module.__call__,
        dense,
        torch.bfloat16,
        2e-2,
        slow_above=512,
    )


def with_onednn_int8(w: Tensor, effort: Effort, *, engine: str) -> Linear:
    """torch's dynamic int8 linear, weights by row, activations by tensor, fp32 in and out."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        scales = w.abs().amax(1).clamp(min=1e-12).double() / 127
        zeros = torch.zeros(w.shape[0], dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
            copies = effort.copies(w.numel())
            weights = [torch.ops.quantized.linear_prepack(q, None) for _ in range(copies)]
            dense = q.dequantize()
    finally:
        torch.backends.quantized.engine = before
    name = "oneDNN int8" if engine == "onednn" else f"torch int8 ({engine})"
    call = lambda packed, x: torch.ops.quantized.linear_dynamic(x, packed, False)  # noqa: E731
    return Linear(name, weights, call, dense, torch.float32, 5e-2)


def with_onednn_int8_bf16(w: Tensor, effort: Effort) -> Linear:
    """oneDNN's int8 product as torch.compile calls it: bf16 x quantized by tensor, bf16 out."""
    scales = w.abs().amax(1).clamp(min=1e-12) / 127
    codes = (w / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(w.shape[0], dtype=torch.long)

    def call(packed: Tensor, x: Tensor) -> Tensor:
        scale = float(x.abs().amax()) / 127 or 1.0
        rounded = torch.round(x * (1 / scale)).to(torch.int8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rounded, scale, 0, packed, scales, zeros, None, 1.0, 0, torch.bfloat16),
            *("none", [], ""),
        )
        return y

    copies = effort.copies(w.numel())
    weights = [torch.ops.onednn.qlinear_prepack(codes, None) for _ in range(copies)]
    dense = codes.float() * scales[:, None]
    return Linear("oneDNN int8, bf16", weights, call, dense, torch.bfloat16, 5e-2)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def _quiet(builder: Builder) -> Builder:
    """Imports of other packages warn and print; the bench's output is its own."""

    def build(w: Tensor, effort: Effort) -> Linear:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return builder(w, effort)

    return build


def _with_ggml(w: Tensor, effort: Effort, *, quant_type: str, buffer: str) -> Linear:
    import cpu_ggml

    return cpu_ggml.with_ggml(w, effort, quant_type=quant_type, buffer=buffer)


GGML = [("Q4_0", "AMX"), ("Q4_0", "CPU_REPACK"), ("Q4_0", "CPU")]
GGML += [("Q4_K", "AMX"), ("Q4_K", "CPU_REPACK"), ("IQ4_NL", "CPU_REPACK"), ("IQ4_NL", "CPU")]
Named = dict[str, Callable[..., Any]]

_BUILDERS: Named = {
    "bitsandbytes eval": partial(with_bitsandbytes, packed_for_eval=True),
    "bitsandbytes train": partial(with_bitsandbytes, packed_for_eval=False),
    "torchao int4": with_torchao_int4,
    "torchao int4, compiled": with_torchao_int4_compiled,
    "torchao int4, int8 activations": with_torchao_int4_int8,
    "torchao int8": partial(with_torchao_int8, dynamic=False),
    "torchao int8, int8 activations": partial(with_torchao_int8, dynamic=True),
    "HQQ": with_hqq,
    "optimum-quanto qint4": partial(with_quanto, bits=4),
    "optimum-quanto qint8": partial(with_quanto, bits=8),
    "oneDNN int8": partial(with_onednn_int8, engine="onednn"),
    "oneDNN int8, bf16": with_onednn_int8_bf16,
    "torch int8 (x86)": partial(with_onednn_int8, engine="x86"),
} | {f"ggml {q} {b}": partial(_with_ggml, quant_type=q, buffer=b) for q, b in GGML}

PEERS: dict[str, Builder] = {name: _quiet(builder) for name, builder in _BUILDERS.items()}
