"""TRL's ``SFTTrainer`` for a quantized model with an adapter.

What differs from the parent:

- a checkpoint holds the adapter, never the frozen base, and resuming restores it;
- the output head runs on trained positions only, on a CPU (where TRL scores every position);
- a loss or gradient that is not finite stops the run before it reaches the adapter;
- every log entry has tokens, seconds and peak memory; nothing is sent anywhere, and no files but
  the checkpoints are written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from qkern import adapters
from qkern.errors import DataError
from qkern.training.errors import DivergedError
from qkern.training.examples import IGNORED
from qkern.training.memory import peak_memory
from qkern.training.record import saved_history

# Logits of the trained positions above this size (fp32 bytes) go through TRL's chunked loss.
MAX_LOGITS_BYTES = 1 << 30
_KEPT_LOGS = ("loss", "grad_norm", "learning_rate", "epoch")


class AdapterTrainer(SFTTrainer):
    """Trains the adapters of a model that ``quantize_model`` and ``add_lora`` prepared.

    Args:
        model: the model, with at least one trainable parameter.
        order: of the examples; random if None.
        **kwargs: as for ``SFTTrainer``; the training set has ``input_ids`` and ``labels``.
    """

    def __init__(
        self, model: PreTrainedModel, *, order: Sampler[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, **kwargs)
        self._order = order
        self._net: nn.Module = model
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.add_callback(_FiniteGradients)
        self._tokens = 0
        self._pending_tokens: list[Tensor] = []
        self._earlier_tokens = 0
        self._started = time.perf_counter()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward of one batch; the loss, detached."""
        self._pending_tokens.append(inputs["attention_mask"].sum())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            msg = (
                f"the loss is {loss.item()} at step {step}: the run stops before the adapter is"
                " touched; lower the learning rate, or look for broken rows in the data"
            )
            raise DivergedError(msg)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001 - the parent's signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean negative log-likelihood of the trained tokens."""
        labels = inputs["labels"]
        if return_outputs or not self._fits(labels):
            everywhere = super().compute_loss
            return everywhere(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        return trained_token_loss(model, inputs, total=num_items_in_batch)

    def _fits(self, labels: Tensor) -> bool:
        if labels.device.type != "cpu":
            return False
        vocabulary: int = _head(self._net).weight.shape[0]
        trained = int((labels[:, 1:] != IGNORED).sum())
        return bool(trained) and 4 * trained * vocabulary <= MAX_LOGITS_BYTES

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Record an entry of the history."""
        metrics = getattr(self, "_metrics", None)
        if metrics is not None:
            for values in metrics.values():
                values.clear()  # TRL's extra metrics: they differ with its version
        if "loss" in logs:
            logs = {key: logs[key] for key in _KEPT_LOGS if key in logs}
            logs |= self._speed()
        super().log(logs, *args, **kwargs)

    def _speed(self) -> dict[str, float]:
        self._tokens += int(sum(self._pending_tokens))
        self._pending_tokens.clear()
        seconds = time.perf_counter() - self._started
        return {
            "tokens": self._earlier_tokens + self._tokens,
            "tokens_per_second": self._tokens / max(seconds, 1e-9),
            "peak_memory": peak_memory(self.args.device),
        }

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone, through ``qkern.save_adapter``."""
        if self.args.should_save:
            check_adapter(self._net)
            adapters.save_adapter(self._net, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter alone, through ``qkern.load_adapter``."""
        adapters.load_adapter(self._net, resume_from_checkpoint)
        history = saved_history(Path(resume_from_checkpoint))
        self._earlier_tokens = history[-1]["tokens"] if history else 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._order or super()._get_train_sampler(train_dataset)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint is no place for a model card."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""


class _FiniteGradients(TrainerCallback):
    """Stops before an update that would destroy the adapter."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:  # the loss scaler meets infinite gradients by design, and skips the step
            return
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                msg = (
                    f"the gradient of {name} is not finite at step {state.global_step + 1}: the run"
                    " stops before the adapter is touched; lower the learning rate"
                )
                raise DivergedError(msg)


def check_adapter(model: nn.Module) -> None:
    """Checks that every trainable value is finite.

    Raises:
        DivergedError: one is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter.detach()).all():
            msg = f"{name} holds NaN or infinity: the adapter is not saved; lower the learning rate"
            raise DivergedError(msg)


def trained_token_loss(model: nn.Module, inputs: dict[str, Any], *, total: Any = None) -> Tensor:
    """Negative log-likelihood of the trained tokens, with logits for those positions only.

    Args:
        model: a causal language model of transformers.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, (batch, tokens).
        total: what the sum is divided by; the number of trained tokens unless given.

    Returns:
        A scalar.

    Raises:
        DataError: if no label is to be predicted, and so there is no mean.
    """
    labels = inputs["labels"][:, 1:]  # (batch, tokens - 1)
    chosen = labels != IGNORED
    if total is None and not chosen.any():
        msg = (
            f"all labels of a batch of {tuple(inputs['labels'].shape)} are masked ({IGNORED}): "
            "nothing is to be predicted; leave such examples out"
        )
        raise DataError(msg)
    arguments = {key: value for key, value in inputs.items() if key != "labels"}
    with _head_on(model, chosen):
        logits = model(**arguments, use_cache=False).logits.squeeze(0)  # (trained, vocabulary)
    loss = nn.functional.cross_entropy(logits.float(), labels[chosen], reduction="sum")
    mean: Tensor = loss / (chosen.sum() if total is None else total)
    return mean


def _head(model: Any) -> Any:
    """The layer that makes logits, of the model inside any wrapper."""
    return model.get_output_embeddings()


@contextlib.contextmanager
def _head_on(model: nn.Module, chosen: Tensor) -> Iterator[None]:
    """Lets the output head see only the hidden states of chosen positions.

    What models do to logits after the head (scaling, soft capping) works on any shape.
    """

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments  # (batch, tokens, width)
        return (hidden[:, :-1][chosen].unsqueeze(0), *rest)  # (1, trained, width)

    handle = _head(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
