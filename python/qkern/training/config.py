"""The settings of a fine-tuning run, checked when they are made. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qkern.formats import QUANT_TYPES, QuantFormat, resolve_format
from qkern.training.errors import SettingError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
COMPUTE = ("exact", "int8")  # as in ``codec``, which loads the native extension
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a run, besides model and data.

    Args:
        epochs: passes over the data; unused when ``steps`` is given.
        steps: optimizer steps, or None to count by epochs.
        lr: peak learning rate.
        schedule: what the learning rate does after the warm-up: "cosine", "linear" or "constant".
        warmup_ratio: share of the steps in which the learning rate rises to ``lr``.
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: AdamW's weight decay on the adapter.
        batch_size: sequences of a forward pass.
        grad_accum: forward passes of an optimizer step.
        max_length: most tokens of a sequence.
        group_by_length: batches of sequences of similar length, for less padding.
        r: rank of the adapter.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r``.
        lora_dropout: dropout on the adapter's input.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        use_dora: train the lengths of the rows of the sum too, see ``qkern.dora``.
        merge_into: train for a merge into this format ("nf4", ...), which then loses nothing; None
            for an adapter that stays beside its base. Needs ``lora_dropout=0``, and no DoRA.
        target_modules: layers that get an adapter: "all-linear", or names.
        target_parameters: names of weights of stacked experts that get one; without dropout alone.
        quant_type: "nf4", "fp4", "int8" or "int8_row" for the frozen weights.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: scales in 8 bits; unused by int8_row.
        dtype: dtype of the arithmetic; "auto" is bfloat16 where the machine has it, else float32.
        compute: "exact", or on a CPU "int8": inputs of the frozen layers are rounded to 8 bits, an
            error of about one per cent; gradients stay exact.
        device: "cpu", "cuda", or "auto" for the GPU where there is one.
        gradient_checkpointing: trade a second forward pass for less memory.
        save_steps: steps between checkpoints; 0 for none but at an interrupt.
        save_total_limit: checkpoints that are kept.
        seed: of the adapter's start, the order of the data and the dropout.

    Raises:
        SettingError: a setting out of its range.
        FormatError: no such quantization.

    Example:
        >>> FinetuneConfig(steps=40, lr=1e-4).effective_batch
        4
    """

    epochs: float = 1.0
    steps: int | None = None
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    batch_size: int = 4
    grad_accum: int = 1
    max_length: int = 1024
    group_by_length: bool = True
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    merge_into: str | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    dtype: str = "auto"
    compute: str = "exact"
    device: str = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 50
    save_total_limit: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.format
        _check("epochs", self.epochs, "more than 0", self.epochs > 0)
        _check("steps", self.steps, "1 or more", self.steps is None or self.steps >= 1)
        _check("lr", self.lr, "more than 0", 0 < self.lr < math.inf)
        _check("warmup_ratio", self.warmup_ratio, "0 to 1", 0 <= self.warmup_ratio <= 1)
        _check("max_grad_norm", self.max_grad_norm, "more than 0", self.max_grad_norm > 0)
        _check("weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0)
        _check("max_length", self.max_length, "2 or more", self.max_length >= 2)
        _check("lora_alpha", self.lora_alpha, "more than 0", self.lora_alpha > 0)
        _check("lora_dropout", self.lora_dropout, "0 to below 1", 0 <= self.lora_dropout < 1)
        _check("save_steps", self.save_steps, "0 or more", self.save_steps >= 0)
        for name in ("batch_size", "grad_accum", "r", "save_total_limit"):
            _check(name, getattr(self, name), "1 or more", getattr(self, name) >= 1)
        self._check_merge_into()
        choices = {"dtype": DTYPES, "compute": COMPUTE, "device": DEVICES, "schedule": SCHEDULES}
        for name, allowed in choices.items():
            _check(name, getattr(self, name), ", ".join(allowed), getattr(self, name) in allowed)

    def _check_merge_into(self) -> None:
        if self.merge_into is None:
            return
        known = self.merge_into in QUANT_TYPES
        _check("merge_into", self.merge_into, ", ".join(QUANT_TYPES), known)
        why = "0 and False with merge_into: base and adapter are one weight then"
        kind = (self.lora_dropout, self.use_dora)
        _check("(lora_dropout, use_dora)", kind, why, kind == (0, False))

    @property
    def format(self) -> QuantFormat:
        """How the frozen weights are stored."""
        return resolve_format(
            self.quant_type, blocksize=self.blocksize, double_quant=self.double_quant
        )

    @property
    def effective_batch(self) -> int:
        """Sequences of an optimizer step."""
        return self.batch_size * self.grad_accum

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a run over so many examples."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(examples / self.batch_size)
        return max(1, math.ceil(self.epochs * math.ceil(batches / self.grad_accum)))

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("target_modules", "target_parameters"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """The settings that ``as_dict`` wrote; settings that are not known here are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in values.items() if key in known}
        for name in ("target_modules", "target_parameters"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)


def _check(name: str, value: object, allowed: str, valid: bool) -> None:  # noqa: FBT001
    if not valid:
        msg = f"{name} is {value!r}: allowed is {allowed}"
        raise SettingError(msg)
