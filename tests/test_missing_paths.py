"""Directories of models and adapters that are not there: what was looked for, and what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_model import save_chat_model
from checkpoints import write
from torch import nn

import qkern
from qkern.cli import exit_codes, main

ADAPTER = r"adapter_config\.json and adapter_model\.safetensors, as qkern\.save_adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("base"))


def cases(tmp_path: Path) -> list[tuple[Path, str]]:
    """Places without an adapter, and what is said of each."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    return [
        (tmp_path / "none", "there is no adapter directory {}"),
        (tmp_path / "empty", "{} holds no adapter, adapter_config.json and adapter_model"),
        (tmp_path / "half", "{} holds no adapter, adapter_model.safetensors missing"),
        (tmp_path / "file", "{} is a file, not the directory of an adapter"),
    ]


def test_an_adapter_that_is_not_there(tmp_path: Path, base: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    qkern.quantize_model(model)
    for path, text in cases(tmp_path):
        with pytest.raises(FileNotFoundError, match=ADAPTER) as found:
            qkern.load_adapter(model, path)
        assert text.format(path) in str(found.value)
        with pytest.raises(FileNotFoundError, match=ADAPTER) as found:
            qkern.merge_checkpoint(base, path, tmp_path / "out")
        assert text.format(path) in str(found.value)
    assert not (tmp_path / "out").exists()


def test_commands_say_so_in_a_line(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = str(tmp_path / "none")
    for arguments in (
        ["generate", str(base), "--adapter", none, "hello"],
        ["merge", str(base), none, str(tmp_path / "out")],
    ):
        assert main(arguments) == exit_codes.IO
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"there is no adapter directory {none}: an adapter is a directory with" in err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    tensors = write(tmp_path / "tensors", {"0.weight": torch.zeros(4, 4)})
    for path, text in (
        (tmp_path / "none", "there is no"),
        (tmp_path / "tensors", "holds no config.json"),
        (tensors / "model.safetensors", "is a file"),
    ):
        for settings in ({}, {"quant_type": "nf4"}):
            with pytest.raises(FileNotFoundError, match=text) as found:
                qkern.load(path, **settings)
            assert str(path) in str(found.value)
            assert "No such file" not in str(found.value)
    with pytest.raises(FileNotFoundError, match=r"as qkern\.save, qkern quantize or"):
        qkern.load(tmp_path / "none")
