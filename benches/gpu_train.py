"""A linear layer with LoRA, forward and backward; and with LoRA on few tokens, forward alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_layers
import gpu_weights
import torch
from gpu_device import is_lost, random
from gpu_layers import SCALING, Parts
from gpu_plan import Cell, Row, Run, Shape
from gpu_timing import Engine, absent, add_ratios, checked, interleaved, relative_error
from gpu_weights import NF4_BYTES
from torch import Tensor, nn

FROZEN, OURS = "torch bf16, frozen, no LoRA", "qkern"
TURNS = (1, 2, 3)  # seeds of activations, a layer for each
TOLERANCE = 2e-2  # relative RMS error of bf16 results


def cells(run: Run) -> Iterator[Cell]:
    """Training in chunks of thousands of tokens; few tokens after that."""
    plan = run.plan
    shapes = [shape for shape in plan.shapes if plan.shapes[shape] <= 2]
    for shape in shapes:
        for M in (8,) if plan.quick else (4096, 2048, 8192):
            importance = 1 if M in (8, 4096) and plan.shapes[shape] == 1 else 2
            name = f"forward and backward {shape[0]}x{shape[1]}, M={M}"
            yield Cell("train", name, importance, 5, partial(steps, run, shape, M))
    for shape in shapes[:2]:
        Ms = [1] if plan.quick else [1, 8, 64, 512]
        name = f"forward with LoRA {shape[0]}x{shape[1]}"
        yield Cell("train", name, 3, 6, partial(forwards, run, shape, Ms))


def compilations(run: Run) -> Iterator[Callable[[], object]]:
    """qkern's forward and backward."""
    if run.plan.quick:
        return
    for shape in [shape for shape in run.plan.shapes if run.plan.shapes[shape] <= 2]:
        for M in (1, 8, 64, 512, 4096):
            yield partial(_compile, shape, M, run.plan.device)


def _compile(shape: Shape, M: int, device: torch.device) -> None:
    layer = gpu_layers.with_qkern(torch.zeros(shape, device=device))
    x = torch.zeros(M, shape[1], dtype=torch.bfloat16, device=device)
    step(layer, Parts.adapter_of(layer), x.requires_grad_(), x.new_zeros(M, shape[0]))


def step(
    layer: nn.Module, adapter: tuple[nn.Parameter, ...], x: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """y, dX, and dA, dB where there is an adapter."""
    with torch.enable_grad():
        y = layer(x)
        grads = torch.autograd.grad(y, (x, *adapter), grad)
    return (y.detach(), *grads)


def check(
    name: str, parts: Parts, found: tuple[Tensor, ...], x: Tensor, grad: Tensor
) -> dict[str, float]:
    """Errors against fp64.

    Raises:
        WrongResultError: if one is too large.
    """
    x64, W = x.detach().double(), parts.W.double()
    exact: list[Tensor] = [x64 @ W.mT]
    if len(found) > 1:
        grad64 = grad.double()
        exact.append(grad64 @ W)
    if parts.adapter:
        A, B = (t.detach().double() for t in parts.adapter)
        h = x64 @ A.mT
        exact[0] += SCALING * h @ B.mT
        if len(found) > 1:
            G = SCALING * grad64 @ B
            exact[1] += G @ A
            exact += [G.mT @ x64, SCALING * grad64.mT @ h]
    names = ("error", "error of dX", "error of dA", "error of dB")
    errors = map(relative_error, found, exact)
    return checked(name, dict(zip(names, errors, strict=False)), TOLERANCE)


def layers(run: Run, shape: Shape) -> Iterator[tuple[str, Any]]:
    """Every package's layer, or the exception that says why it cannot be had."""
    device = run.plan.device
    w = gpu_weights.values(shape, device)
    makers = dict(gpu_layers.OWN)
    if run.plan.peers:
        try:
            makers |= gpu_layers.peers(device, w.numel())
        except Exception as error:
            yield "bitsandbytes", error
    for name, make in makers.items():
        yield name, _attempt(name, _filled, make, w)


def _attempt(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns, or the exception of a peer; qkern and torch must not fail."""
    try:
        return work(*arguments)
    except Exception as error:
        if name in gpu_layers.OWN or is_lost(arguments[-1].device):
            raise
        return error


def _filled(make: Callable[[Tensor], nn.Module], w: Tensor) -> nn.Module:
    layer = make(w)
    Parts.fill_adapter(layer)
    return layer


def steps(run: Run, shape: Shape, M: int) -> Iterator[Row]:
    """Forward, dX and the adapter's gradients; weights and activations in turn."""
    device = run.plan.device
    tokens = [random(M, shape[1], device=device, seed=s).bfloat16().requires_grad_() for s in TURNS]
    grads = [random(M, shape[0], device=device, seed=-s).bfloat16() for s in TURNS]
    x, grad = tokens[0], grads[0]
    about = {"case": "forward and backward", "dtype": "bf16", "M": M, "N": shape[0], "K": shape[1]}
    engines = []
    for name, layer in layers(run, shape):
        errors = layer
        if not isinstance(layer, Exception):
            errors = _attempt(name, _check_step, name, layer, x, grad)
        if isinstance(errors, Exception):
            yield absent(name, errors, **about)
            continue
        copies = gpu_layers.copied(layer, 1 if run.plan.quick else len(TURNS))
        operands = zip(copies, map(Parts.adapter_of, copies), tokens, grads, strict=False)
        engines.append(
            Engine(name, [partial(step, *each) for each in operands], errors, graph=True)
        )
    yield from _compared(run, engines, about)


def _check_step(name: str, layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, float]:
    parts = Parts(layer)
    return check(name, parts, step(layer, parts.adapter, x, grad), x, grad)


def _check_forward(name: str, layer: nn.Module, x: Tensor) -> dict[str, float]:
    return check(name, Parts(layer), (layer(x),), x, x)


def forwards(run: Run, shape: Shape, Ms: list[int]) -> Iterator[Row]:
    """Without gradients, the adapter in it."""
    device, made = run.plan.device, dict[str, Any]()
    for name, layer in layers(run, shape):
        nbytes = shape[0] * shape[1] * (2 if name.startswith("torch") else NF4_BYTES)
        fails = isinstance(layer, Exception)
        made[name] = layer if fails else gpu_layers.copied(layer, run.plan.effort.copies(nbytes))
    for M in Ms:
        x = random(M, shape[1], device=device, seed=M).bfloat16()
        about = {"case": "forward with LoRA", "dtype": "bf16", "M": M}
        about |= {"N": shape[0], "K": shape[1]}
        engines = []
        for name, copies in made.items():
            errors = copies
            if not isinstance(copies, Exception):
                errors = _attempt(name, _check_forward, name, copies[-1], x)
            if isinstance(errors, Exception):
                yield absent(name, errors, **about)
                continue
            calls = [partial(layer, x) for layer in copies]
            engines.append(Engine(name, calls, errors, graph=True))
        yield from _compared(run, engines, about)


def _compared(run: Run, engines: list[Engine], about: Row) -> Iterator[Row]:
    rows = interleaved(engines, run.plan.effort, run.plan.device)
    frozen = next(row["median"] for row in rows if row["engine"] == FROZEN)
    ours = next(row["median"] for row in rows if row["engine"] == OURS)
    add_ratios(rows, FROZEN, f"times faster than {FROZEN}")
    for row in rows:
        row["qkern is times faster"] = row["median"] / ours
        row["time against frozen"] = row["median"] / frozen
        yield about | row
