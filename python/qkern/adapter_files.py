"""Where an adapter is: in its two files, or among the weights of its base. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qkern.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from qkern.errors import CorruptFileError
from qkern.files import pickle_advice

_PICKLED: Final = "adapter_model.bin"
# Entries of ``add_lora``'s adapters in a model's ``state_dict``.
_IN_MODEL: Final = re.compile(r"\.adapters\.[^.]+\.(.+\.)?lora_\w+")
_WAY_OUT: Final = (
    "build the model as it was (quantized, then the same qkern.add_lora), and give the Trainer "
    "resume_from_checkpoint, or call qkern.load(path, model) and keep the adapter by "
    "qkern.save_adapter"
)


def check_files(directory: Path) -> None:
    """Refuse a directory without an adapter.

    Raises:
        FileNotFoundError: if a file is missing, naming it.
        CorruptFileError: if the weights are a pickle.
    """
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (directory / name).is_file()]
    if not missing:
        return
    pickled = directory / _PICKLED
    if missing == [WEIGHTS_NAME] and pickled.is_file():
        msg = f"there is no {directory / WEIGHTS_NAME}: {pickle_advice(pickled)}"
        raise CorruptFileError(msg)
    if any(directory.glob("model*.safetensors")):
        msg = (
            f"{directory} holds a model's weights, but no {' and no '.join(missing)}: if a Trainer "
            f"wrote them for a model with qkern.add_lora, the adapter is among them: {_WAY_OUT}"
        )
        raise FileNotFoundError(msg)
    if directory.is_dir():
        found = f"{directory} holds no adapter, {' and '.join(missing)} missing"
    elif directory.exists():
        found = f"{directory} is a file, not the directory of an adapter"
    else:
        found = f"there is no adapter directory {directory}"
    msg = (
        f"{found}: an adapter is a directory with {CONFIG_NAME} and {WEIGHTS_NAME}, as "
        "qkern.save_adapter, qkern finetune or PEFT's save_pretrained writes it"
    )
    raise FileNotFoundError(msg)


def kept_with_base(keys: Iterable[str]) -> str:
    """What to do with weights that an adapter is among, which a Trainer writes so; else empty.

    Its settings (``lora_alpha``, ...) are in no file then.

    Args:
        keys: of the weights.
    """
    found = next((key for key in keys if _IN_MODEL.search(key)), None)
    if found is None:
        return ""
    return f"{found} is an adapter's, kept with its base, as a Trainer does: {_WAY_OUT}"
