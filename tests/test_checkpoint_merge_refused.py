"""``merge_checkpoint``: which adapters, bases and values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write
from peft_adapters import (
    model,
    reconfigure,
    rewrite,
    write_adapter,
    write_base,
)
from safetensors.torch import load_file, save_file

import qkern


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", model())


REFUSED = [
    ({"use_dora": True}, "use_dora=True"),
    ({"peft_type": "LOHA"}, "of type 'LOHA'"),
    ({"init_lora_weights": "pissa"}, "changed the base weights"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"new_kind_of_lora": {"on": True}}, "new_kind_of_lora"),
    ({"r": 8}, "has rank 4, the settings say 8"),
]


@pytest.mark.case("E8")
@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_settings_that_are_not_applied_are_refused(
    tmp_path: Path, base: Path, adapter: Path, changes: dict[str, Any], text: str
) -> None:
    reconfigure(adapter, **changes)
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused_with_the_nearest_names(
    tmp_path: Path, adapter: Path
) -> None:
    other = write_base(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(qkern.AdapterMismatchError, match=r"nearest: model\.layers\.0"):
        qkern.merge_checkpoint(other, adapter, tmp_path / "out")
    write(tmp_path / "gpt", {"h.0.attn.c_attn.weight": torch.ones(8, 8)})
    what = r"nearest: none\. 6 of .* 6 modules are missing here; .* called like h\.0\.attn"
    with pytest.raises(qkern.AdapterMismatchError, match=what):
        qkern.merge_checkpoint(tmp_path / "gpt", adapter, tmp_path / "out")
    wider = write_base(tmp_path / "wider", hidden_size=256)
    with pytest.raises(qkern.AdapterMismatchError, match=r"\(out, in, r\) ="):
        qkern.merge_checkpoint(wider, adapter, tmp_path / "out")


def test_entries_that_are_no_adapter_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    whole = load_file(adapter / "adapter_model.safetensors")

    def refused(change: Any, text: str) -> None:
        save_file(dict(whole), adapter / "adapter_model.safetensors")
        rewrite(adapter, change)
        with pytest.raises(qkern.AdapterMismatchError, match=text):
            qkern.merge_checkpoint(base, adapter, tmp_path / "out")

    refused(lambda tensors: tensors.pop(key), r"q_proj needs lora_A")
    magnitude = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    refused(lambda tensors: tensors.update({magnitude: torch.ones(4)}), "unexpected entry")
    refused(lambda tensors: tensors.clear(), "holds no adapter")
    refused(lambda tensors: tensors.update({key: tensors[key].int()}), "int32: allowed are")


def test_a_resized_embedding_is_refused(tmp_path: Path, base: Path) -> None:
    larger = model(vocab_size=104)
    adapter = write_adapter(tmp_path / "adapter", larger, modules_to_save=["embed_tokens"])
    with pytest.raises(qkern.AdapterMismatchError, match=r"embed_tokens\.weight by \[104, 128\]"):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.case("E6")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_an_adapter_is_refused_by_the_layer_it_is_in(
    tmp_path: Path, base: Path, adapter: Path, value: float
) -> None:
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    rewrite(adapter, lambda tensors: tensors[key][3].fill_(value))
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.case("E6")
def test_a_sum_too_large_for_fp16_is_refused_by_its_layer(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    rewrite(adapter, lambda tensors: tensors[key].mul_(1e9))
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.down_proj.* float16"):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    qkern.merge_checkpoint(base, adapter, tmp_path / "out", dtype="bfloat16")


def test_pickled_adapters_are_refused_with_the_way(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(qkern.CorruptFileError, match="weights_only=True"):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out")


def test_another_base_than_the_adapter_names_is_refused(tmp_path: Path, base: Path) -> None:
    """The fingerprint that ``save_adapter`` writes, of a base read without torch."""
    for name, quant_type in [("right", "nf4"), ("wrong", "fp4"), ("rows", "int8_row")]:
        qkern.quantize_checkpoint(base, tmp_path / name, quant_type)
    for name in ("right", "rows"):
        trained = model()
        qkern.quantize_model(trained, "nf4" if name == "right" else "int8_row")
        qkern.add_lora(trained, r=4, target_modules=["q_proj", "down_proj"])
        qkern.save_adapter(trained, tmp_path / f"adapter-{name}")
        adapter = tmp_path / f"adapter-{name}"
        report = qkern.merge_checkpoint(tmp_path / name, adapter, tmp_path / f"out-{name}")
        assert report.base_check == "the base is the one that the adapter was trained over"
        assert report.kept is None  # B is 0: there is nothing to keep
        with pytest.raises(qkern.AdapterMismatchError, match="other quantized weights"):
            qkern.merge_checkpoint(tmp_path / "wrong", adapter, tmp_path / "no")
    forced = qkern.merge_checkpoint(tmp_path / "wrong", adapter, tmp_path / "no", force=True)
    assert "forced" in forced.base_check
    dense = qkern.merge_checkpoint(base, adapter, tmp_path / "dense")
    assert "the base here is dense" in dense.base_check
    assert "qkern quantize" in dense.base_check
