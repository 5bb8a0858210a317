"""Training runs on a tiny model: they learn, save, resume to the bit, stop, and refuse."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import byte_tokenizer, save_chat_model, write_chats
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from trainer_callbacks import Fail, InfiniteGradient, SendSigint, poisoned, with_callback

import qkern
from qkern import adapters
from qkern.errors import AdapterMismatchError, DataError, FormatError
from qkern.formats import QuantFormat
from qkern.training import (
    DivergedError,
    FinetuneConfig,
    FinetuneResult,
    SettingError,
    TrainingInterrupted,
    finetune,
    prepare_data,
)
from qkern.training.base import check_compute, load_finetuned, load_frozen
from qkern.training.run import Session
from qkern.training.trainer import AdapterTrainer, trained_token_loss

# 24 rows in batches of 4 are 6 steps an epoch: 9 steps end in the second one.
CONFIG = FinetuneConfig(
    steps=9,
    lr=2e-2,
    batch_size=4,
    r=4,
    lora_alpha=8,
    lora_dropout=0.1,
    save_steps=0,
    dtype="float32",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def whole(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """An uninterrupted run."""
    return finetune(model_dir, data, tmp_path_factory.mktemp("whole"), CONFIG)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / adapters.WEIGHTS_NAME)


def equal(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def test_a_run_learns_and_writes_its_files(whole: FinetuneResult) -> None:
    assert whole.steps == 9
    assert whole.losses[-1] < 0.9 * whole.losses[0]
    names = {path.name for path in whole.output_dir.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "finetune.json", "loss.png"}
    assert names == files | {"training_log.json"}
    log = json.loads((whole.output_dir / "training_log.json").read_text())
    assert [entry["loss"] for entry in log["history"]] == whole.losses
    assert log["config"]["lr"] == CONFIG.lr
    assert log["result"]["steps"] == 9
    assert log["data"]["examples"] == 24
    assert (whole.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_of_a_run(whole: FinetuneResult) -> None:
    assert whole.coverage > 0.5
    assert whole.bytes_after < 0.7 * whole.bytes_before
    assert whole.trainable == sum(t.numel() for t in weights(whole.output_dir).values())
    assert whole.tokens_per_second > 0
    assert whole.peak_memory > whole.bytes_after
    json.dumps(whole.as_dict())


def test_only_the_adapter_was_trained(whole: FinetuneResult, model_dir: Path) -> None:
    base = load_frozen(model_dir, QuantFormat(), dtype=torch.float32).model
    for name, parameter in base.named_parameters():
        trained = whole.model.get_parameter(name)
        assert torch.equal(torch.as_tensor(parameter), torch.as_tensor(trained)), name


def test_a_reloaded_adapter_gives_the_same_logits(whole: FinetuneResult, model_dir: Path) -> None:
    again = load_finetuned(model_dir, whole.output_dir, dtype=torch.float32)
    assert torch.equal(logits(again), logits(whole.model))
    assert whole.model.config.use_cache
    assert adapters.read_quantization(whole.output_dir) == QuantFormat("nf4", 64)


def test_peft_reads_the_adapter(whole: FinetuneResult, model_dir: Path) -> None:
    base = load_frozen(model_dir, QuantFormat(), dtype=torch.float32).model
    peft = PeftModel.from_pretrained(base, str(whole.output_dir))
    torch.testing.assert_close(logits(peft), logits(whole.model), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_run(
    whole: FinetuneResult, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    again = finetune(model_dir, data, tmp_path, CONFIG)
    assert again.losses == whole.losses
    assert equal(tmp_path, whole.output_dir)


# After step 4 inside the first epoch, at its end, and inside the second one.
@pytest.mark.case("E9")
@pytest.mark.parametrize("stop", [4, 6, 7])
def test_resume_equals_an_uninterrupted_run(
    stop: int, whole: FinetuneResult, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "train", with_callback(SendSigint(stop)))
        with pytest.raises(TrainingInterrupted) as caught:
            finetune(model_dir, data, tmp_path, CONFIG)
    assert caught.value.step == stop
    assert caught.value.checkpoint == tmp_path / f"checkpoint-{stop}"
    assert not (tmp_path / adapters.WEIGHTS_NAME).exists()
    torch.manual_seed(1234)  # nothing may depend on the state of this process
    result = finetune(model_dir, data, tmp_path, resume=True)
    assert result.losses == whole.losses
    assert result.history[-1]["tokens"] == whole.history[-1]["tokens"]
    assert equal(tmp_path, whole.output_dir)


@pytest.mark.case("E9")
def test_resume_with_random_order_and_accumulation(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = dataclasses.replace(
        CONFIG, steps=5, batch_size=2, grad_accum=3, group_by_length=False, save_steps=2
    )
    straight = finetune(model_dir, data, tmp_path / "a", config)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "train", with_callback(Fail(4)))
        with pytest.raises(RuntimeError, match="power cut"):
            finetune(model_dir, data, tmp_path / "b", config)
    resumed = finetune(model_dir, data, tmp_path / "b", resume=True)
    assert resumed.losses == straight.losses
    assert equal(tmp_path / "a", tmp_path / "b")


def test_an_unfinished_checkpoint_is_passed_over(
    whole: FinetuneResult, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "train", with_callback(SendSigint(4)))
        with pytest.raises(TrainingInterrupted):
            finetune(model_dir, data, tmp_path, CONFIG)
    (tmp_path / "checkpoint-8").mkdir()
    result = finetune(model_dir, data, tmp_path, resume=True)
    assert result.losses == whole.losses


def test_resume_of_a_finished_run_takes_no_step(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, steps=2, save_steps=1)
    done = finetune(model_dir, data, tmp_path, config)
    again = finetune(model_dir, data, tmp_path, resume=True)
    assert again.history == done.history
    assert torch.equal(logits(again.model), logits(done.model))
    # Killed between the last checkpoint and the adapter.
    (tmp_path / "training_log.json").unlink()
    (tmp_path / adapters.WEIGHTS_NAME).unlink()
    again = finetune(model_dir, data, tmp_path, resume=True)
    assert again.losses == done.losses
    assert equal(tmp_path, tmp_path / "checkpoint-2")


def test_checkpoints_hold_the_adapter_only(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=4, save_steps=1, save_total_limit=2)
    result = finetune(model_dir, data, tmp_path, config)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-4"]
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names == states | {"adapter_config.json", "adapter_model.safetensors"}
    assert equal(tmp_path / "checkpoint-4", result.output_dir)


def test_a_second_interrupt_stops_at_once(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(AdapterTrainer, "train", with_callback(SendSigint(3, times=2)))
    with pytest.raises(TrainingInterrupted, match="nothing was saved yet"):
        finetune(model_dir, data, tmp_path, CONFIG, say=lines.append)
    assert any("again: stop at once" in line for line in lines)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_a_thread_leaves_signals_alone(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, steps=1)
    results: list[FinetuneResult] = []
    run = threading.Thread(
        target=lambda: results.append(finetune(model_dir, data, tmp_path, config))
    )
    run.start()
    run.join()
    assert results[0].steps == 1


@pytest.mark.case("E11")
def test_a_diverging_run_keeps_the_old_adapter(
    whole: FinetuneResult, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    qkern.save_adapter(whole.model, tmp_path)
    before = weights(tmp_path)
    monkeypatch.setattr(AdapterTrainer, "compute_loss", poisoned(AdapterTrainer.compute_loss))
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        finetune(model_dir, data, tmp_path, CONFIG, overwrite=True)
    after = weights(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.case("E11")
def test_an_infinite_gradient_stops_before_the_update(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(AdapterTrainer, "train", with_callback(InfiniteGradient()))
    with pytest.raises(DivergedError, match=r"lora_A is not finite at step 1"):
        finetune(model_dir, data, tmp_path, CONFIG)


@pytest.mark.case("E11")
def test_an_adapter_with_nan_is_not_saved(model_dir: Path, data: Path, tmp_path: Path) -> None:
    session = Session(model_dir, None, CONFIG, lambda _: None)  # type: ignore[arg-type]
    name, parameter = next((n, p) for n, p in session.model.named_parameters() if p.requires_grad)
    parameter.data[0, 0] = torch.nan
    from qkern.training.trainer import check_adapter

    with pytest.raises(DivergedError, match=name):
        check_adapter(session.model)


def test_an_earlier_run_is_not_overwritten(
    whole: FinetuneResult, model_dir: Path, data: Path
) -> None:
    with pytest.raises(FileExistsError, match="resume it, overwrite it, or use another"):
        finetune(model_dir, data, whole.output_dir, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 1e-3}, "lr 0.02 to 0.001"), ({"seed": 5, "r": 8}, "r 4 to 8, seed 0 to 5")],
)
def test_resume_refuses_other_settings(
    changes: dict[str, Any], message: str, whole: FinetuneResult, model_dir: Path, data: Path
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(SettingError, match=message):
        finetune(model_dir, data, whole.output_dir, config, resume=True)


def test_resume_refuses_other_data(whole: FinetuneResult, model_dir: Path, tmp_path: Path) -> None:
    other = write_chats(tmp_path / "other.jsonl", count=23)
    with pytest.raises(SettingError, match=r"token ids .* are not those"):
        finetune(model_dir, other, whole.output_dir, resume=True)


def test_resume_of_nothing(model_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nothing to resume"):
        finetune(model_dir, data, tmp_path, resume=True)


def test_a_tokenizer_without_end_and_padding(model_dir: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    prepared = prepare_data(data, tokenizer)
    config = dataclasses.replace(CONFIG, steps=1)
    assert finetune(model_dir, prepared, tmp_path, config).steps == 1


def test_gradient_checkpointing_and_bfloat16(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=3, gradient_checkpointing=True, dtype="bfloat16")
    result = finetune(model_dir, data, tmp_path, config)
    assert result.losses[-1] < result.losses[0]


def test_a_base_that_computes_in_int8(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config, said = dataclasses.replace(CONFIG, steps=3, compute="int8"), []
    result = finetune(model_dir, data, tmp_path, config, say=said.append)
    assert result.losses[-1] < result.losses[0]
    assert {m.compute for m in result.model.modules() if hasattr(m, "compute")} == {"int8"}
    assert "computing in float32 on cpu, the base with int8 inputs" in said
    with pytest.raises(SettingError, match="compute int8 to exact"):
        finetune(model_dir, data, tmp_path, dataclasses.replace(CONFIG, steps=3), resume=True)


def test_loss_on_trained_positions_equals_the_models_own(model_dir: Path) -> None:
    model = load_frozen(model_dir, QuantFormat(), dtype=torch.float32).model
    ids = torch.randint(3, 259, (3, 12))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 9:] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    expected = model(**inputs).loss
    torch.testing.assert_close(trained_token_loss(model, inputs), expected)
    total = (labels[:, 1:] != -100).sum()
    halved = trained_token_loss(model, inputs, total=2 * total)
    torch.testing.assert_close(2 * halved, expected)


def test_settings_of_the_format_and_the_machine(
    model_dir: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="blocksize 60"):
        FinetuneConfig(blocksize=60)
    with pytest.raises(SettingError, match="compute is 'int8', which is for a CPU, not for cuda"):
        check_compute("int8", torch.device("cuda"))
    with pytest.raises(SettingError, match="does not train on a CPU"):
        finetune(model_dir, data, tmp_path / "a", FinetuneConfig(dtype="float16", device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="torch sees no GPU"):
            finetune(model_dir, data, tmp_path / "b", FinetuneConfig(device="cuda"))


@pytest.mark.parametrize("quantized", [False, True])
def test_what_can_be_refused_at_once_is_refused_before_the_data_is_read(
    quantized: bool, whole: FinetuneResult, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    base = model_dir
    if quantized:
        base = tmp_path / "nf4"
        qkern.quantize_checkpoint(model_dir, base)
    unread = tmp_path / "none.jsonl"
    config = dataclasses.replace(CONFIG, target_modules=("q_proj", "query"))
    with pytest.raises(AdapterMismatchError, match="'query' matches no quantized layer; nearest"):
        finetune(base, unread, tmp_path / "out", config)
    config = dataclasses.replace(CONFIG, target_parameters=("experts.up",))
    with pytest.raises(AdapterMismatchError, match=r"'experts\.up' matches no quantized weight"):
        finetune(base, unread, tmp_path / "out", config)
    with pytest.raises(SettingError, match="does not train on a CPU"):
        finetune(base, unread, tmp_path / "out", FinetuneConfig(dtype="float16", device="cpu"))
    with pytest.raises(FileExistsError, match="--resume, --overwrite"):
        finetune(base, unread, whole.output_dir, CONFIG)
    config = dataclasses.replace(CONFIG, r=8)
    with pytest.raises(SettingError, match="r 4 to 8"):
        finetune(base, unread, whole.output_dir, config, resume=True)
    assert not (tmp_path / "out").exists()
    config = dataclasses.replace(CONFIG, steps=1, target_modules=("q_proj",))
    assert finetune(base, data, tmp_path / "out", config).steps == 1


def test_bad_data_is_found_before_the_model_is_loaded(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"tekst": "b"}\n')
    with pytest.raises(DataError, match="line 2"):
        finetune(model_dir, path, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
