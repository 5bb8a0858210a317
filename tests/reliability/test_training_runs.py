"""Runs that stop, diverge, or have nothing to learn from: exact, or a typed error and old files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import byte_tokenizer, chat, save_chat_model, write_chats, write_jsonl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_net import adapted, inputs
from torch import Tensor, nn
from toys import tiny_llama, token_ids
from transformers import Trainer, TrainingArguments

import qkern
from qkern.errors import DataError, NonFiniteError
from qkern.layers import QLoRALinear
from qkern.training import DivergedError, FinetuneConfig, finetune, prepare_data
from qkern.training.trainer import AdapterTrainer, trained_token_loss

CONFIG = FinetuneConfig(steps=4, lr=2e-2, batch_size=4, r=4, save_steps=1, dtype="float32")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


# -- resumed by transformers' own trainer ----------------------------------------------------


def trainer(output: Path, steps: int) -> Trainer:
    """``transformers.Trainer`` as it is, over PEFT's adapters with dropout."""
    model = tiny_llama()
    qkern.quantize_model(model)
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in token_ids(12, 16).tolist()]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant_with_warmup",  # whose rates do not depend on the last step
        warmup_steps=3,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model=get_peft_model(model, config), args=arguments, train_dataset=Dataset.from_list(rows)
    )


def losses_of(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.case("E9")
def test_an_unmodified_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "parts", 2).train()
    torch.manual_seed(99)
    second = trainer(tmp_path / "parts", 4)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses_of(second) == losses_of(whole)
    files = [load_file(tmp_path / d / "checkpoint-4" / WEIGHTS) for d in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert all(".lora_" in key for key in files[0])


# -- not a number ----------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the loss of one batch be NaN."""
    original, calls = AdapterTrainer.compute_loss, []

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(self, *args, **kwargs)
        return loss * torch.nan if len(calls) == at else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)


@pytest.mark.case("E11")
def test_nan_in_one_batch_stops_a_run_whose_checkpoints_stay_good(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(model_dir, data, tmp_path / "whole", CONFIG)
    with monkeypatch.context() as patch:
        poison(patch, at=3)
        with pytest.raises(DivergedError, match=r"the loss is nan at step 3.*before the adapter"):
            finetune(model_dir, data, tmp_path / "run", CONFIG)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))[-1] == (
        "checkpoint-2"
    )
    assert not (tmp_path / "run" / WEIGHTS).exists()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    resumed = finetune(model_dir, data, tmp_path / "run", resume=True)  # the batch is good now
    assert resumed.losses == whole.losses


@pytest.mark.case("E11")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_adapter_that_is_no_number_is_not_saved_over_a_good_one(
    value: float, tmp_path: Path
) -> None:
    model = adapted()
    qkern.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.down.lora_B[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"down\.lora_B\.weight holds 1 values.*of 24"):
        qkern.save_adapter(model, tmp_path)
    with pytest.raises(NonFiniteError, match="not saved"):
        qkern.save_adapter(model, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.case("E11")
def test_a_loss_of_nan_reaches_every_gradient_and_no_packed_byte() -> None:
    """What a loop of one's own has to look for: the loss, before the optimizer's step."""
    model = adapted()
    packed = model.up.weight.packed.clone()
    (model(inputs()).sum() * torch.nan).backward()
    assert all(p.grad.isnan().all() for p in model.parameters() if p.requires_grad)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isnan()
    assert torch.equal(model.up.weight.packed, packed)


# -- nothing to learn from -------------------------------------------------------------------


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A directory that a refused run must not have made."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.case("E12")
@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_an_empty_dataset_is_refused(
    content: str, model_dir: Path, tmp_path: Path, untouched: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        finetune(model_dir, tmp_path / "empty.jsonl", untouched, CONFIG)


@pytest.mark.case("E12")
def test_an_example_with_nothing_left_to_predict_is_refused(
    model_dir: Path, tmp_path: Path, untouched: Path
) -> None:
    rows = [chat("hello", "ok"), chat("a" * 600, "never seen")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"line 2.*the prompt alone is 6\d\d tokens.*max_length"):
        finetune(model_dir, file, untouched, dataclasses.replace(CONFIG, max_length=64))


@pytest.mark.case("E12")
def test_an_example_that_is_too_long_is_cut_counted_and_trained(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [chat("hi", "yes " * 200), chat("ho", "no")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare_data(file, byte_tokenizer(), max_length=64)
    long, short = prepared.examples
    assert len(long.input_ids) == 64 < len(long.input_ids) + long.cut
    assert short.cut == 0
    assert (prepared.summary.cut_examples, prepared.summary.cut_tokens) == (1, long.cut)
    config = dataclasses.replace(CONFIG, steps=2, batch_size=2, max_length=64)
    result = finetune(model_dir, prepared, tmp_path / "out", config)
    assert all(0 < loss < 20 for loss in result.losses)


def masked(rows: int) -> dict[str, Tensor]:
    """A batch in which the first rows have no label."""
    ids = token_ids(3, 8)
    labels = ids.clone()
    labels[:rows] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.case("E12")
def test_a_batch_with_no_label_at_all_is_refused_and_not_0_by_0() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    qkern.add_lora(model, r=2, init_lora_weights=False)
    with pytest.raises(DataError, match=r"all labels of a batch of \(3, 8\) are masked \(-100\)"):
        trained_token_loss(model, masked(3))
    part = trained_token_loss(model, masked(3), total=7)  # of a step with labels in other batches
    assert part.item() == 0
    part.backward()
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            assert layer.lora_A.grad is None or not layer.lora_A.grad.any()


@pytest.mark.case("E12")
def test_rows_without_a_label_change_nothing() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    batch = masked(2)
    alone = {key: value[2:] for key, value in batch.items()}
    expected = model(**alone).loss
    torch.testing.assert_close(trained_token_loss(model, batch), expected)
    torch.testing.assert_close(trained_token_loss(model, alone), expected)
