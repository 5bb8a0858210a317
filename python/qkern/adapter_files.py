"""An adapter's two files, looked for before anything is read of them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qkern.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from qkern.errors import CorruptFileError
from qkern.files import pickle_advice

_PICKLED: Final = "adapter_model.bin"


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
