"""Several streams at once: each has its own counters and workspace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_work import layer, step
from kernel_device import DEVICE, same_bytes

import qkern

STREAMS = 4


@pytest.mark.parametrize("M", [1, 4, 33, 128])
def test_products_on_streams_are_those_of_one_stream(M: int) -> None:
    weights = [qkern.quantize(torch.randn(512, 4096, device=DEVICE)) for _ in range(STREAMS)]
    inputs = [torch.randn(M, 4096, device=DEVICE).bfloat16() for _ in range(STREAMS)]
    right = [qkern.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, x, w in zip(streams, inputs, weights, strict=True):
            with torch.cuda.stream(stream):
                found.append([qkern.linear(x, w) for _ in range(10)])
        torch.cuda.synchronize()
        for each, expected in zip(found, right, strict=True):
            assert all(same_bytes(y, expected) for y in each)


def test_threads_with_a_stream_each_train_as_one_does() -> None:
    made = [layer(512, 1024) for _ in range(STREAMS)]
    x, grad = (torch.randn(40, n, device=DEVICE).bfloat16() for n in (1024, 512))
    right = [step(each, x, grad) for each in made]
    torch.cuda.synchronize()

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            runs = []
            for _ in range(10):
                found = step(made[index], x, grad)
                torch.cuda.current_stream().synchronize()
                runs.append(all(map(same_bytes, found, right[index])))
        return all(runs)

    with ThreadPoolExecutor(STREAMS) as pool:
        assert list(pool.map(work, range(STREAMS))) == [True] * STREAMS
