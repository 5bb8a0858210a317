"""DDP and FSDP on two gloo processes give what one process gives (see distributed_worker.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import Stack

pytest.importorskip("torch.distributed")
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.case("D21")
def test_data_parallel_without_gpus_is_the_model_itself() -> None:
    model, x = Stack(), torch.randn(4, 256)
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(wrapped(x), model(x))
    wrapped(x).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in model.layers)


@pytest.mark.case("D21")
def test_two_processes_equal_one() -> None:
    import distributed_worker

    run = subprocess.run(
        [sys.executable, str(WORKER)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    worked = [line for line in run.stdout.splitlines() if line.startswith("works: ")]
    assert worked == [f"works: {leg.__name__}" for leg in distributed_worker.LEGS]
    if not distributed_worker.HAS_FSDP2:
        pytest.skip("DDP works; FSDP2 between CPU processes fails in this torch, quantized or not")
