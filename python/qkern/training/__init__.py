"""Fine-tuning: a thin layer over TRL's trainer, from a data file to an adapter.

    from qkern.training import FinetuneConfig, finetune

    result = finetune("MODEL", "data.jsonl", "adapter", FinetuneConfig(steps=100))

Needs ``pip install "qkern[train]"``; importing this package does not.
"""

from qkern.training.config import FinetuneConfig
from qkern.training.data import read_rows
from qkern.training.errors import DivergedError, SettingError, TrainingInterrupted
from qkern.training.examples import Example, build_examples
from qkern.training.finetune import FinetuneResult, finetune
from qkern.training.prepare import PreparedData, prepare_data

__all__ = [
    "DivergedError",
    "Example",
    "FinetuneConfig",
    "FinetuneResult",
    "PreparedData",
    "SettingError",
    "TrainingInterrupted",
    "build_examples",
    "finetune",
    "prepare_data",
    "read_rows",
]
