"""An unmodified ``transformers.Trainer`` over models that ``QkernConfig`` quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hf_models import load, logits, write_dense
from safetensors.torch import load_file
from torch import Tensor, nn

import qkern
from qkern.integrations.transformers import QkernConfig, model_config
from qkern.layers import QuantizedLinear

pytestmark = pytest.mark.usefixtures("without_gpu")
STEPS = 4
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"), num_hidden_layers=1)


def rows() -> list[dict[str, Tensor]]:
    tokens = torch.arange(16)[:, None] + torch.arange(10)
    return [{"input_ids": row, "labels": row} for row in tokens]


def with_own_adapters(path: Path) -> Any:
    model = load(path, quantization_config=QkernConfig())
    torch.manual_seed(2)
    qkern.add_lora(model, r=4, lora_alpha=16)
    return model


def with_peft(path: Path) -> Any:
    model = load(path, quantization_config=QkernConfig())
    torch.manual_seed(2)
    config = peft.LoraConfig(**LORA, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def with_added_adapter(path: Path) -> Any:
    """By transformers' own method, which asks PEFT."""
    model = load(path, quantization_config=QkernConfig())
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


def with_preparation(path: Path) -> Any:
    model = peft.prepare_model_for_kbit_training(load(path, quantization_config=QkernConfig()))
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))


MODELS = [with_own_adapters, with_peft, with_added_adapter]


def trainer(model: Any, path: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=4,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows())


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [
        module.quantized_weight.packed.clone()
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    ]


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [*MODELS, with_preparation])
def test_it_trains_adapters_and_nothing_else(
    tmp_path: Path, dense: Path, build: Any, checkpointing: bool
) -> None:
    model = build(dense)
    before, codes = trained_values(model), packed_bytes(model)
    assert len(before) == 14
    assert all("lora_" in name for name in before)
    run = trainer(model, tmp_path, gradient_checkpointing=checkpointing)
    run.train()
    assert len(losses(run)) == STEPS
    assert losses(run)[-1] < losses(run)[0]
    after = trained_values(model)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    assert all(map(torch.equal, packed_bytes(model), codes))


def test_both_kinds_of_adapter_have_the_same_losses(tmp_path: Path, dense: Path) -> None:
    runs = [trainer(build(dense), tmp_path / build.__name__) for build in MODELS]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-2)
    assert losses(runs[2]) == pytest.approx(losses(runs[1]), rel=2e-2)


@pytest.mark.parametrize("build", MODELS[:2])  # the third no Trainer resumes, dense or not
def test_a_run_that_is_resumed_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, dense: Path, build: Any
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(build(dense), tmp_path, **settings)
    whole.train()
    resumed = trainer(build(dense), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = trained_values(whole.model)
    assert expected.keys() == trained_values(resumed.model).keys()
    for name, value in trained_values(resumed.model).items():
        assert torch.equal(value, expected[name]), name
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("build", MODELS[1:])
def test_a_checkpoint_with_pefts_adapter_holds_the_adapter_only(
    tmp_path: Path, dense: Path, build: Any
) -> None:
    run = trainer(build(dense), tmp_path, save_strategy="steps", save_steps=STEPS)
    run.train()
    path = tmp_path / f"checkpoint-{STEPS}"
    assert [file.name for file in path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    entries = load_file(path / "adapter_model.safetensors")
    assert all(".lora_" in key for key in entries)
    base = load(dense, quantization_config=QkernConfig())
    again = peft.PeftModel.from_pretrained(base, path)
    difference = (logits(again) - logits(run.model)).norm()
    assert difference < 1e-2 * logits(run.model).norm()  # bfloat16


def test_a_checkpoint_with_an_own_adapter_opens_as_no_other_model(
    tmp_path: Path, dense: Path
) -> None:
    run = trainer(with_own_adapters(dense), tmp_path, save_strategy="steps", save_steps=STEPS)
    run.train()
    with pytest.raises(qkern.CorruptFileError, match="is an adapter's, kept with its base"):
        load(tmp_path / f"checkpoint-{STEPS}")
    qkern.save_adapter(run.model, tmp_path / "adapter")
    base = load(dense, quantization_config=QkernConfig())
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    difference = (logits(again) - logits(run.model)).norm()
    assert difference < 1e-2 * logits(run.model).norm()  # bfloat16


def plain_with_own_adapters(path: Path) -> Any:
    """Quantized by ``quantize_model``: ``config.json`` does not say so."""
    model = load(path)
    qkern.quantize_model(model)
    torch.manual_seed(2)
    qkern.add_lora(model, r=4, lora_alpha=16, modules_to_save=["norm"])
    return model


@pytest.mark.parametrize("build", [with_own_adapters, plain_with_own_adapters])
def test_what_save_model_writes_of_an_own_adapter_says_how_it_is_opened(
    tmp_path: Path, dense: Path, build: Any
) -> None:
    run, out = trainer(build(dense), tmp_path), tmp_path / "out"
    run.train()
    run.save_model(str(out))
    way = r"the same qkern.add_lora.*qkern.load\(path, model\).*save_adapter"
    for opened in (qkern.load, lambda path: qkern.merge_checkpoint(path, path, tmp_path / "m")):
        with pytest.raises((qkern.CorruptFileError, FileNotFoundError), match=way):
            opened(out)
    with pytest.raises(FileNotFoundError, match=rf"no adapter_config\.json .*{way}"):
        qkern.load_adapter(build(dense), out)
    with pytest.raises(qkern.FormatError, match=rf"lora_\w is an adapter's, .*{way}"):
        qkern.convert_checkpoint(out, tmp_path / "c", "bfloat16")
    if build is plain_with_own_adapters:
        with pytest.raises(qkern.FormatError, match=r"does not say .*qkern\.load opens them"):
            model_config(out)
    again = build(dense)
    assert not torch.equal(logits(again), logits(run.model))
    qkern.load(out, again)
    assert torch.equal(logits(again), logits(run.model))
    qkern.save_adapter(again, tmp_path / "adapter")
    base = qkern.load(dense, quant_type="nf4")
    qkern.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base), logits(run.model))


def test_without_an_adapter_there_is_nothing_to_train(tmp_path: Path, dense: Path) -> None:
    model = load(dense, quantization_config=QkernConfig())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises((ValueError, RuntimeError)):
        trainer(model, tmp_path).train()
