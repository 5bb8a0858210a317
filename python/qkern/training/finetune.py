"""Fine-tuning from a model directory and a data file to an adapter directory.

    result = finetune("SmolLM2-135M-Instruct", "data.jsonl", "adapter")

The output directory holds PEFT's two adapter files, ``training_log.json``, ``loss.png``,
``finetune.json`` (what the run is, for ``resume``) and the last checkpoints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkern.training.config import FinetuneConfig
from qkern.training.prepare import PreparedData, prepare_data
from qkern.training.record import (
    LOG_NAME,
    RunRecord,
    check_directory,
    check_settings,
    find_checkpoint,
    finished_run,
    start_directory,
)
from qkern.training.requirements import TRAINING, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CURVE_NAME = "loss.png"


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Args:
        output_dir: where the adapter is.
        steps: optimizer steps, those before a resume included.
        history: one entry per step, with ``loss``, ``learning_rate``, ``tokens`` and more.
        seconds: of training, in this process.
        tokens_per_second: tokens trained on per second, context included.
        peak_memory: bytes; resident memory of the process, or of tensors on a GPU.
        trainable: parameters of the adapter.
        coverage: share of the weights that were quantized, 0 to 1.
        bytes_before: of the model as loaded.
        bytes_after: of the quantized model, without the adapter.
        model: the trained model, in evaluation mode.
        tokenizer: its tokenizer.
    """

    output_dir: Path
    steps: int
    history: list[dict[str, Any]]
    seconds: float
    tokens_per_second: float
    peak_memory: int
    trainable: int
    coverage: float
    bytes_before: int
    bytes_after: int
    model: PreTrainedModel = dataclasses.field(repr=False)
    tokenizer: PreTrainedTokenizerBase = dataclasses.field(repr=False)

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [entry["loss"] for entry in self.history]

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without model and history."""
        values = dict(vars(self))
        for name in ("model", "tokenizer", "history"):
            del values[name]
        losses = self.losses
        edges = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        return values | edges | {"output_dir": str(self.output_dir)}


def finetune(
    model_path: str | PathLike[str],
    data: str | PathLike[str] | PreparedData,
    output_dir: str | PathLike[str],
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Train a LoRA adapter over a quantized base model.

    Args:
        model_path: a model directory (dense or quantized) or GGUF file.
        data: a training file (see ``read_rows``), or what ``prepare_data`` made of one.
        output_dir: where adapter, log and checkpoints go.
        config: the settings; None for the defaults, or for those of the run that is resumed.
        resume: continue from the last checkpoint in ``output_dir``, exactly as if the run had not
            stopped; a finished run is loaded as it is.
        overwrite: replace an earlier run in ``output_dir``.
        progress: show a progress bar on stderr.
        say: gets lines for people.

    Returns:
        The figures of the run, and the trained model.

    Raises:
        MissingDependencyError: a package for training is not installed.
        DataError: the data cannot be used.
        AdapterMismatchError: ``target_modules`` or ``target_parameters`` name no layer.
        SettingError: a setting that this machine does not have, or a resume with other settings
            or data than the run began with.
        DivergedError: the loss or a gradient is NaN or infinite; no file is replaced.
        FileExistsError: ``output_dir`` holds an earlier run, without ``resume`` or ``overwrite``.
        TrainingInterrupted: Ctrl-C; a checkpoint was saved.
    """
    require(TRAINING, "fine-tuning")
    from qkern.integrations.pretrained import load_tokenizer

    say = say or (lambda _: None)
    output = Path(output_dir)
    if config is None:
        config = RunRecord.read(output).config if resume else FinetuneConfig()
    check_start(model_path, output, config, resume=resume, overwrite=overwrite)
    if isinstance(data, PreparedData):
        prepared, tokenizer = data, data.tokenizer
    else:
        tokenizer = load_tokenizer(model_path)
        prepared = prepare_data(data, tokenizer, max_length=config.max_length)
        say(str(prepared.summary))
    record = RunRecord(str(model_path), prepared.source, prepared.fingerprint, config)
    checkpoint = find_checkpoint(output, record) if resume else None
    if not resume:
        start_directory(output, record, overwrite=overwrite)
    from qkern.training import run

    session = run.Session(model_path, tokenizer, config, say)
    started = time.perf_counter()
    steps = config.total_steps(len(prepared.examples))
    finished = finished_run(output, steps) if resume else None
    if finished is not None:
        say("the run was finished already")
        history = session.restore(*finished, output)
    else:
        history = session.train(prepared, output, checkpoint, progress=progress)
    seconds = time.perf_counter() - started
    result = session.result(output, history, seconds)
    _write_log(result, record, prepared)
    return result


def check_start(
    model_path: str | PathLike[str],
    output_dir: str | PathLike[str],
    config: FinetuneConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Refuse what ``finetune`` would, before anything slow: data and weights are not read.

    Args:
        model_path: as for ``finetune``, as the rest.
        output_dir: where adapter, log and checkpoints would go.
        config: the settings.
        resume: whether an earlier run is to go on.
        overwrite: whether it is to be replaced.

    Raises:
        FileExistsError: ``output_dir`` holds an earlier run, without ``resume`` or ``overwrite``.
        FileNotFoundError: there is no model.
        SettingError, AdapterMismatchError: see ``finetune``.
    """
    output = Path(output_dir)
    if resume:
        check_settings(output, config)
    else:
        check_directory(output, overwrite=overwrite)
    from qkern.training.early_checks import check_run

    check_run(model_path, config)


def _write_log(result: FinetuneResult, record: RunRecord, data: PreparedData) -> None:
    from qkern.files import write_json
    from qkern.training.loss_curve import write_loss_curve

    content = record.as_dict()
    content |= {"data": dataclasses.asdict(data.summary), "result": result.as_dict()}
    write_json(result.output_dir / LOG_NAME, content | {"history": result.history})
    write_loss_curve(result.history, result.output_dir / CURVE_NAME)
