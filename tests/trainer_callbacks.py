"""What interrupts a training run or makes it diverge."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from transformers import TrainerCallback

from qkern.training.trainer import AdapterTrainer


class SendSigint(TrainerCallback):
    """Ctrl-C during a step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class InfiniteGradient(TrainerCallback):
    """A gradient that overflows under a finite loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameter = next(p for p in kwargs["model"].parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient + torch.inf)


class Fail(TrainerCallback):
    """A crash in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            msg = "power cut"
            raise RuntimeError(msg)


def with_callback(callback: TrainerCallback) -> Any:
    original = AdapterTrainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(callback)
        return original(self, *args, **kwargs)

    return train


def poisoned(compute_loss: Any) -> Any:
    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compute_loss(self, *args, **kwargs) * torch.nan

    return poisoned
