"""CUDA graphs: captured once, replayed with new inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_work import captured, layer
from kernel_device import DEVICE, same_bytes
from torch import Tensor, nn

import qkern


def tokens(M: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, features, device=DEVICE).to(dtype)


@pytest.mark.parametrize("M", [1, 2, 8, 64, 200, 512])
def test_a_replayed_forward_follows_its_input(M: int) -> None:
    made = layer(1000, 1024, adapter=torch.bfloat16)
    x = tokens(M, 1024)
    with torch.no_grad():
        replay, y = captured(lambda: made(x))
        for _ in range(3):
            new = tokens(M, 1024)
            x.copy_(new)
            replay()
            replayed = y.clone()
            y.fill_(torch.nan)
            replay()
            assert same_bytes(replayed, y)
            torch.testing.assert_close(y, made(new), rtol=1e-2, atol=1e-2)


def test_replays_of_a_split_product_beside_calls_of_it_count_apart() -> None:
    weight = qkern.quantize(tokens(1024, 4096))
    x, other = tokens(8, 4096), tokens(8, 4096)
    right = [qkern.linear(t, weight) for t in (x, other)]
    replay, y = captured(lambda: qkern.linear(x, weight))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        y.fill_(torch.nan)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            replay()
        called = qkern.linear(other, weight)
        torch.cuda.synchronize()
        assert same_bytes(y, right[0])
        assert same_bytes(called, right[1])


def test_a_captured_dequantize_follows_the_bytes() -> None:
    weight = qkern.quantize(tokens(256, 512))
    replay, dense = captured(lambda: weight.dequantize(torch.bfloat16))
    other = qkern.quantize(tokens(256, 512))
    for part, new in zip(weight.parts, other.parts, strict=True):
        part.copy_(new)
    replay()
    assert same_bytes(dense, other.dequantize(torch.bfloat16))


def trained(steps: list[tuple[Tensor, Tensor]], *, graph: bool) -> dict[str, Tensor]:
    """Two layers' adapters after a step for each (input, target), from a fixed start."""
    torch.manual_seed(3)
    features = steps[0][0].shape[1]
    model = nn.Sequential(layer(512, features, r=8), nn.GELU(), layer(features, 512, r=8))
    start = {name: t.detach().clone() for name, t in model.named_parameters() if t.requires_grad}
    adapters = [t for t in model.parameters() if t.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=1e-2)
    x, target = (t.clone() for t in steps[0])

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Any = (model(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = captured(step)[0] if graph else step
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    for new_x, new_target in steps:
        x.copy_(new_x)
        target.copy_(new_target)
        run()
    return {name: t.detach() for name, t in model.named_parameters() if name in start}


@pytest.mark.parametrize("M", [4, 96, 700])
def test_a_replayed_training_step_learns_what_a_called_one_does(M: int) -> None:
    steps = [(tokens(M, 256), tokens(M, 256)) for _ in range(4)]
    called, replayed = (trained(steps, graph=graph) for graph in (False, True))
    untrained = trained(steps[:1], graph=False)
    for name, right in called.items():
        torch.testing.assert_close(replayed[name], right, rtol=1e-3, atol=1e-5)
        assert not torch.equal(right, untrained[name]), name
