"""One training session: from the frozen model to the saved adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig

from qkern import adapters
from qkern.model import add_lora
from qkern.text_table import format_bytes
from qkern.training.base import (
    check_compute,
    check_format,
    format_name,
    load_frozen,
    resolve_device,
    resolve_dtype,
)
from qkern.training.config import FinetuneConfig
from qkern.training.errors import TrainingInterrupted
from qkern.training.finetune import FinetuneResult
from qkern.training.interrupt import InterruptCallback
from qkern.training.order import LengthGroupedOrder
from qkern.training.progress import ProgressCallback
from qkern.training.record import last_checkpoint
from qkern.training.trainer import AdapterTrainer, check_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkern.training.prepare import PreparedData


class Session:
    """A quantized model with a fresh adapter, ready to train.

    Args:
        model_path: the base model.
        tokenizer: its tokenizer.
        config: the settings.
        say: gets lines for people.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        config: FinetuneConfig,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.tokenizer, self._say = config, tokenizer, say
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        check_compute(config.compute, self.device)
        self.frozen = load_frozen(
            model_path, config.format, dtype=self.dtype, compute=config.compute
        )
        self.model, was = self.frozen.model, self.frozen.was
        if config.format != FinetuneConfig().format:
            check_format(was, config.format, model_path)
        elif was is not None:
            say(f"the model is quantized already, and stays {format_name(was)}")
        torch.manual_seed(config.seed)
        add_lora(
            self.model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=config.target_modules,
            target_parameters=config.target_parameters,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            merge_into=config.merge_into,
        )
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        before, after = (
            format_bytes(getattr(self.frozen, f"bytes_{x}")) for x in ("before", "after")
        )
        fmt = was or config.format
        share = f"{self.frozen.coverage.coverage:.0%} of the weights in {fmt.quant_type}"
        say(f"model: {before} -> {after} ({share}), {self.trainable} trainable parameters")
        rounded = "" if config.compute == "exact" else f", the base with {config.compute} inputs"
        say(f"computing in {str(self.dtype).removeprefix('torch.')} on {self.device}{rounded}")

    def train(
        self, data: PreparedData, output: Path, checkpoint: Path | None, *, progress: bool
    ) -> list[dict[str, Any]]:
        """Train, and save the adapter into ``output``; the history of the losses.

        Raises:
            NonFiniteError: the run diverged; nothing was replaced.
            TrainingInterrupted: Ctrl-C.
        """
        if self.tokenizer.pad_token is None:  # padding is masked: any token serves
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)
        interrupt = InterruptCallback(self._say)
        bar = ProgressCallback() if progress else None
        trainer = AdapterTrainer(
            model=self.model,
            args=self._arguments(output, len(data.examples)),
            train_dataset=_dataset(data),
            processing_class=self.tokenizer,
            callbacks=[interrupt, *([bar] if bar else [])],
            order=self._order(data),
        )
        try:
            with interrupt.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt as error:
            raise TrainingInterrupted(trainer.state.global_step, last_checkpoint(output)) from error
        finally:
            if bar:
                bar.close()
            self._restore()
        if trainer.state.global_step < trainer.state.max_steps:
            raise TrainingInterrupted(trainer.state.global_step, last_checkpoint(output))
        check_adapter(self.model)
        adapters.save_adapter(self.model, output)
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    def restore(
        self, adapter: Path, history: list[dict[str, Any]], output: Path
    ) -> list[dict[str, Any]]:
        """Load the adapter of a run that has nothing left to do; its history."""
        adapters.load_adapter(self.model, adapter)
        self.model.train(mode=False)
        if adapter != output:  # stopped between the last checkpoint and the adapter
            adapters.save_adapter(self.model, output)
        return history

    def result(self, output: Path, history: list[dict[str, Any]], seconds: float) -> FinetuneResult:
        """The figures of a finished run."""
        last = history[-1]
        return FinetuneResult(
            output_dir=output,
            steps=last["step"],
            history=history,
            seconds=seconds,
            tokens_per_second=last["tokens_per_second"],
            peak_memory=last["peak_memory"],
            trainable=self.trainable,
            coverage=self.frozen.coverage.coverage,
            bytes_before=self.frozen.bytes_before,
            bytes_after=self.frozen.bytes_after,
            model=self.model,
            tokenizer=self.tokenizer,
        )

    def _order(self, data: PreparedData) -> LengthGroupedOrder | None:
        config = self.config
        if not config.group_by_length:
            return None
        lengths = [len(example.input_ids) for example in data.examples]
        return LengthGroupedOrder(lengths, batch=config.batch_size, seed=config.seed)

    def _arguments(self, output: Path, examples: int) -> SFTConfig:
        config = self.config
        steps = config.total_steps(examples)
        arguments = SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.grad_accum,
            learning_rate=config.lr,
            lr_scheduler_type=_SCHEDULERS[config.schedule],
            warmup_steps=math.ceil(config.warmup_ratio * steps),
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            optim="adamw_torch",
            bf16=self.dtype is torch.bfloat16,
            fp16=self.dtype is torch.float16,
            use_cpu=self.device.type == "cpu",
            seed=config.seed,
            data_seed=config.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 500,
            save_total_limit=config.save_total_limit,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=self.device.type != "cpu",
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **_checkpointing(enabled=config.gradient_checkpointing),
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process trains on one GPU
        return arguments

    def _restore(self) -> None:
        """Give the model back as it was loaded: its own forward, its cache for generation."""
        self.model.__dict__.pop("forward", None)
        self.model.__dict__.pop("_original_forward", None)
        self.model.config.use_cache = True
        self.model.zero_grad(set_to_none=True)
        self.model.train(mode=False)


_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def _checkpointing(*, enabled: bool) -> dict[str, Any]:
    """Under its name in the installed transformers."""
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    name = "activation_checkpointing"
    name = name if name in names else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}}


def _dataset(data: PreparedData) -> Dataset:
    columns = {
        "input_ids": [list(example.input_ids) for example in data.examples],
        "labels": [list(example.labels) for example in data.examples],
    }
    return Dataset.from_dict(columns)
