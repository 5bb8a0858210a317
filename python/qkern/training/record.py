"""The output directory of a run: what the run is, and from where it can continue."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from qkern.errors import CorruptFileError
from qkern.files import read_json, write_json
from qkern.training.config import FinetuneConfig
from qkern.training.errors import SettingError

RECORD_NAME = "finetune.json"
LOG_NAME = "training_log.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FREE = ("save_steps", "save_total_limit")  # settings that may change when a run is resumed
# The last file that a checkpoint gets: without it the checkpoint is unfinished.
_LAST_FILE = "trainer_state.json"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What decides every number of a run.

    Args:
        model: path of the base model.
        data: path of the training file.
        fingerprint: checksum of the token ids and labels.
        config: the settings.
    """

    model: str
    data: str
    fingerprint: str
    config: FinetuneConfig

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        values = {"model": self.model, "data_file": self.data, "data_sha256": self.fingerprint}
        return values | {"config": self.config.as_dict()}

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """The record of an earlier run.

        Raises:
            SettingError: there is none.
            CorruptFileError: it cannot be read.
        """
        path = directory / RECORD_NAME
        if not path.exists():
            msg = f"nothing to resume: {path} does not exist; start the run without resume"
            raise SettingError(msg)
        content = read_json(path)
        try:
            config = FinetuneConfig.from_dict(content["config"])
            return cls(content["model"], content["data_file"], content["data_sha256"], config)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{path}: not a record of a run: {error!r}"
            raise CorruptFileError(msg) from error


def check_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that is no place for a new run.

    Raises:
        FileExistsError: it holds an earlier run or an adapter, and ``overwrite`` is off.
    """
    earlier = [directory / RECORD_NAME, directory / "adapter_model.safetensors"]
    earlier = [*(path for _, path in _checkpoints(directory)), *earlier]
    found = next((path for path in earlier if path.exists()), None)
    if found is not None and not overwrite:
        msg = (
            f"{found} is from an earlier run: resume it, overwrite it, or use another directory "
            "(--resume, --overwrite, -o; in Python resume=True, overwrite=True)"
        )
        raise FileExistsError(msg)


def start_directory(directory: Path, record: RunRecord, *, overwrite: bool) -> None:
    """Make a directory ready for a new run, and write its record.

    Raises:
        FileExistsError: see ``check_directory``.
    """
    check_directory(directory, overwrite=overwrite)
    for _, checkpoint in _checkpoints(directory):
        shutil.rmtree(checkpoint)
    (directory / LOG_NAME).unlink(missing_ok=True)
    write_json(directory / RECORD_NAME, record.as_dict())


def check_settings(directory: Path, config: FinetuneConfig) -> RunRecord:
    """The run in a directory, if these settings can go on with it.

    Raises:
        SettingError: the directory holds no run, or one with other settings.
    """
    earlier = RunRecord.read(directory)
    before, now = earlier.config.as_dict(), config.as_dict()
    changed = [key for key in now if key not in _FREE and before[key] != now[key]]
    if changed:
        pairs = ", ".join(f"{key} {before[key]} to {now[key]}" for key in changed)
        msg = f"cannot resume {directory} with other settings: {pairs}; start a new run for that"
        raise SettingError(msg)
    return earlier


def find_checkpoint(directory: Path, record: RunRecord) -> Path | None:
    """The last finished checkpoint of the same run; None if it stopped before the first.

    Raises:
        SettingError: the directory holds no run, or one with other settings or data.
    """
    earlier = check_settings(directory, record.config)
    if earlier.fingerprint != record.fingerprint:
        msg = (
            f"cannot resume {directory}: the token ids of {record.data} are not those that the run"
            f" began with ({earlier.data}); restore the file and the tokenizer, or start a new run"
        )
        raise SettingError(msg)
    return last_checkpoint(directory)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest finished checkpoint in a directory."""
    return next((path for _, path in _checkpoints(directory) if (path / _LAST_FILE).exists()), None)


def finished_run(directory: Path, steps: int) -> tuple[Path, list[dict[str, Any]]] | None:
    """Where the adapter of a finished run is, and the run's history; None if steps are missing."""
    log, checkpoint = directory / LOG_NAME, last_checkpoint(directory)
    if log.exists():
        return directory, read_json(log)["history"]
    if checkpoint is None or int(checkpoint.name.rpartition("-")[2]) < steps:
        return None
    return checkpoint, saved_history(checkpoint)


def saved_history(checkpoint: Path) -> list[dict[str, Any]]:
    """The entries, one per step, of the run up to a checkpoint."""
    entries = read_json(checkpoint / _LAST_FILE)["log_history"]
    return [entry for entry in entries if "loss" in entry]


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Steps and paths, newest first."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)
