"""Before anything is timed: every operation on ragged shapes against fp64, or the host's bytes.

This is where assembly and tensor-core instructions meet numbers. What is wrong here is named in the
results, and makes the bench end with 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_device import random
from gpu_plan import Cell, Row, Run, Shape
from gpu_timing import relative_error
from torch import Tensor

import qkern
from qkern import reference
from qkern.formats import QuantFormat
from qkern.tensor import QuantizedTensor

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Largest |found - exact| / |exact|: one rounding of each value, and sums in fp32.
BOUNDS = {FP32: 5e-6, FP16: 1e-3, BF16: 5e-3}
KINDS = ("nf4", "fp4", "int8", "int8_row")
Case = tuple[Shape, str, torch.dtype]


def cells(run: Run) -> Iterator[Cell]:
    """An operation each."""
    for name, work in WORKS.items():
        yield Cell("checks", name, 0, 6, partial(_all, work, run))


def compilations(run: Run) -> Iterator[Callable[[], object]]:
    """The checks themselves, one by one."""
    for work in WORKS.values():
        for case in cases(run):
            yield partial(list, work(run, *case))


def _all(work: Callable[..., Iterator[Row]], run: Run) -> Iterator[Row]:
    for case in cases(run):
        yield from work(run, *case)


def cases(run: Run) -> Iterator[Case]:
    """Ends that fill no tile; the second also leaves columns of wide tiles empty."""
    quick = run.plan.quick
    shapes = [(40, 128)] if quick else [(1000, 4160), (4104, 1344)]
    kinds = [(kind, BF16) for kind in (KINDS[::2] if quick else KINDS)]
    if not quick:
        kinds += [("nf4", FP16), ("nf4", FP32)]
    for shape, kind in itertools.product(shapes, kinds):
        yield shape, *kind


def tokens(run: Run) -> tuple[int, ...]:
    """One; every kind of tile; more than fused kernels take."""
    return (1, 20) if run.plan.quick else (1, 2, 3, 5, 16, 17, 64, 65, 130, 200, 512, 700)


def judged(op: str, error: float, bound: float, **about: object) -> Row:
    """A row; ``wrong`` where the error is larger than it may be, or no number."""
    named = {k: str(v).removeprefix("torch.") for k, v in about.items() if k == "dtype"}
    row = {"case": "check", "op": op, **about, **named, "error": error, "bound": bound}
    return row if error <= bound else row | {"wrong": True}


def quantized(run: Run, shape: Shape, kind: str) -> QuantizedTensor:
    """A random weight on the device."""
    w = random(*shape, device=run.plan.device, seed=shape[0]) / shape[1] ** 0.5
    return qkern.quantize(w, kind)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Bits, and nothing else."""
    flat = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def codec(run: Run, shape: Shape, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """Quantize and dequantize by kernels, beside the host's code: share of parts that differ."""
    from qkern.kernels.dequantize import dequantize
    from qkern.kernels.quantize import quantize
    from qkern.kernels.quantize_absmax import quantize_absmax
    from qkern.ops import host

    fmt = QuantFormat(kind, 64, double_quant=False).for_shape(shape)
    values = random(*shape, device=run.plan.device, seed=1).to(dtype)
    packed, absmax = quantize(values, fmt)
    parts = [packed, absmax]
    right = [*host.quantize(values.cpu(), fmt, "error")]
    if kind != "int8_row":
        parts += quantize_absmax(absmax)[:3]
        right += host.quantize_absmax(right[1])[:3]
    decoded = dequantize(packed, absmax, None, None, fmt, values.numel(), dtype)
    there = reference.Parts(right[0], right[1], None, None)
    expected = torch.empty(values.numel(), dtype=dtype, device="cpu")
    host.dequantize_into(there, fmt, expected)
    pairs = [*zip(parts, right, strict=True), (decoded, expected)]
    differ = sum(not same_bytes(*pair) for pair in pairs) / len(pairs)
    about = {"dtype": dtype, "format": kind, "N": shape[0], "K": shape[1]}
    yield judged("quantize, dequantize: bytes", differ, 0.0, **about)


def products(run: Run, shape: Shape, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """Each number of tokens, with an adapter and a bias where their turn comes."""
    device = run.plan.device
    q = quantized(run, shape, kind)
    dense = q.dequantize(dtype).double()
    bias = random(shape[0], device=device, seed=2).to(dtype)
    for turn, M in enumerate(tokens(run)):
        x = random(M, shape[1], device=device, seed=M).to(dtype)
        exact = x.double() @ dense.mT
        about = {"dtype": dtype, "format": kind, "M": M, "N": shape[0], "K": shape[1]}
        if turn % 2:
            rank = (3, 16, 17)[turn % 3]
            A = random(rank, shape[1], device=device, seed=3) / shape[1] ** 0.5
            B = random(shape[0], rank, device=device, seed=4)
            y = qkern.linear(x, q, bias, lora_A=A, lora_B=B, scaling=0.5)
            exact += bias.double() + 0.5 * x.double() @ A.double().mT @ B.double().mT
            about["r"] = rank
        else:
            y = qkern.linear(x, q)
        yield judged("linear", relative_error(y, exact), BOUNDS[dtype], **about)


def gradients(run: Run, shape: Shape, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """dX, dA and dB of a layer with an adapter, through autograd."""
    device = run.plan.device
    q = quantized(run, shape, kind)
    dense = q.dequantize(dtype).double()
    A = (random(16, shape[1], device=device, seed=3) / shape[1] ** 0.5).requires_grad_()
    B = random(shape[0], 16, device=device, seed=4).requires_grad_()
    A64, B64 = A.detach().double(), B.detach().double()
    for M in tokens(run):
        x = random(M, shape[1], device=device, seed=M).to(dtype).requires_grad_()
        grad = random(M, shape[0], device=device, seed=M + 1).to(dtype)
        with torch.enable_grad():
            y = qkern.linear(x, q, lora_A=A, lora_B=B, scaling=0.5)
            found = torch.autograd.grad(y, (x, A, B), grad)
        x64, grad64 = x.detach().double(), grad.double()
        h, G = 0.5 * x64 @ A64.mT, 0.5 * grad64 @ B64
        exact = (grad64 @ dense + G @ A64, G.mT @ x64, grad64.mT @ h)
        about = {"dtype": dtype, "format": kind, "M": M, "N": shape[0], "K": shape[1]}
        for name, got, right in zip(("dX", "dA", "dB"), found, exact, strict=True):
            yield judged(name, relative_error(got, right), BOUNDS[dtype], **about)


def merged(run: Run, shape: Shape, kind: str, dtype: torch.dtype) -> Iterator[Row]:
    """W + s B A, rounded once."""
    from qkern.kernels import launch
    from qkern.kernels.dequantize_merged import dequantize_merged

    device = run.plan.device
    q = quantized(run, shape, kind)
    A, B = random(16, shape[1], device=device), random(shape[0], 16, device=device) / 100
    got = dequantize_merged(launch.weight(*q.parts, q.format, shape), A, B, 0.5, dtype)
    exact = q.dequantize(FP32).double() + 0.5 * B.double() @ A.double()
    about = {"dtype": dtype, "format": kind, "N": shape[0], "K": shape[1]}
    yield judged("merged", relative_error(got, exact), BOUNDS[dtype], **about)


WORKS: dict[str, Callable[..., Iterator[Row]]] = {
    "bytes": codec,
    "linear": products,
    "gradients": gradients,
    "merged": merged,
}
