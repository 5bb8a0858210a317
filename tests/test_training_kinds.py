"""Kinds of adapters in training runs: they learn, go on from a checkpoint to the bit, and merge."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model, write_chats
from safetensors.torch import load_file
from torch import Tensor

import qkern
from qkern import adapters
from qkern.training import FinetuneConfig, SettingError, finetune
from qkern.training.base import load_finetuned

CONFIG = FinetuneConfig(
    steps=6, lr=2e-2, batch_size=4, r=4, lora_alpha=8, save_steps=3, dtype="float32"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def test_a_quantized_base_stays_as_it_is_or_is_refused(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    base, said = tmp_path / "int8", list[str]()
    qkern.quantize_checkpoint(model_dir, base, "int8")
    run = finetune(base, data, tmp_path / "adapter", CONFIG, say=said.append)
    assert run.losses[-1] < run.losses[0]
    assert "the model is quantized already, and stays int8 in blocks of 64" in said
    asked = dataclasses.replace(CONFIG, quant_type="fp4", blocksize=128)
    message = r"fp4 in blocks of 128 is asked for, but .* is int8 in blocks of 64 already"
    with pytest.raises(SettingError, match=message):
        finetune(base, data, tmp_path / "other", asked)
    with pytest.raises(SettingError, match="nf4 in blocks of 64 is asked for"):
        load_finetuned(base, fmt=qkern.QuantFormat("nf4"))
    same = load_finetuned(base, tmp_path / "adapter", fmt=qkern.QuantFormat("int8"))
    assert torch.equal(logits(same), logits(load_finetuned(base, tmp_path / "adapter")))


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"use_rslora": True}, {"merge_into": "nf4"}], ids=str
)
def test_kinds_learn_resume_reload_and_merge(
    kind: dict[str, Any], model_dir: Path, data: Path, tmp_path: Path
) -> None:
    run = finetune(model_dir, data, tmp_path, dataclasses.replace(CONFIG, **kind))
    assert run.losses[-1] < run.losses[0]
    file = tmp_path / adapters.WEIGHTS_NAME
    written = load_file(file)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "training_log.json").unlink()
    file.unlink()
    resumed = finetune(model_dir, data, tmp_path, resume=True)
    assert resumed.losses == run.losses
    again = load_file(file)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)
    assert any("lora_magnitude" in key for key in written) == kind.get("use_dora", False)

    model = load_finetuned(model_dir, tmp_path, dtype=torch.float32)
    before = logits(model)
    assert torch.equal(before, logits(run.model))
    kept = qkern.merge_adapter(model).kept
    assert (kept > 0.999) == ("merge_into" in kind)
    assert torch.equal(logits(model), before) == ("merge_into" in kind)
