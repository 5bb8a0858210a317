"""Adapters through merges, resumed training and new tokens: each state is right or an error."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from small_net import Net, adapted, assert_same_parts, inputs, parts_of, quantized, wrapped
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern
from qkern.layers import QLoRALinear

# -- merged and not --------------------------------------------------------------------------


@pytest.mark.case("E4")
def test_each_state_allows_one_way_out() -> None:
    model, x = adapted(), inputs()
    base, expected = parts_of(model), model(x)
    with pytest.raises(qkern.AdapterMismatchError, match="up is not merged"):
        qkern.unmerge_adapter(model)
    qkern.merge_adapter(model)
    merged = parts_of(model)
    with pytest.raises(qkern.AdapterMismatchError, match="up is merged already"):
        qkern.merge_adapter(model)
    assert_same_parts(model, merged)
    qkern.unmerge_adapter(model)
    assert_same_parts(model, base)
    assert torch.equal(model(x), expected)
    with pytest.raises(qkern.AdapterMismatchError, match="up is not merged"):
        qkern.unmerge_adapter(model)
    assert_same_parts(model, base)


@pytest.mark.case("E4")
def test_a_model_that_is_merged_in_part_is_refused_whole() -> None:
    model = adapted()
    half = nn.ModuleDict({"up": model.up})
    qkern.merge_adapter(half)
    before = parts_of(model)
    with pytest.raises(qkern.AdapterMismatchError, match="up is merged already"):
        qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="down is not merged"):
        qkern.unmerge_adapter(model)
    assert_same_parts(model, before)
    qkern.unmerge_adapter(half)
    assert_same_parts(model, parts_of(quantized()))


@pytest.mark.case("E4")
@pytest.mark.parametrize("build", [quantized, Net])
def test_without_an_adapter_there_is_nothing_to_merge(build: object) -> None:
    for work in (qkern.merge_adapter, qkern.unmerge_adapter):
        with pytest.raises(qkern.AdapterMismatchError, match=r"no .*adapter"):
            work(build())


@pytest.mark.case("E4")
def test_what_needs_the_base_alone_is_refused_while_merged(tmp_path: Path) -> None:
    model = adapted()
    qkern.save_adapter(model, tmp_path / "adapter")
    qkern.merge_adapter(model)
    before = parts_of(model)
    for work in (
        lambda: qkern.load_adapter(model, tmp_path / "adapter"),
        lambda: qkern.save(model, tmp_path / "model"),
        lambda: qkern.add_lora(model),
    ):
        with pytest.raises(qkern.AdapterMismatchError):
            work()
    assert_same_parts(model, before)
    assert not (tmp_path / "model").exists()


@pytest.mark.case("E4")
def test_unmerge_restores_the_bytes_whatever_became_of_the_adapter() -> None:
    model = adapted()
    base = parts_of(model)
    qkern.merge_adapter(model)
    with torch.no_grad():
        model.up.lora_A.mul_(3)
        model.down.lora_B.zero_()
    for state in (copy.deepcopy(model), model):
        qkern.unmerge_adapter(state)
        assert_same_parts(state, base)


@pytest.mark.case("E4")
def test_pefts_own_merges_keep_to_the_same_states() -> None:
    model, x = wrapped(), inputs()
    base, expected = parts_of(model), model(x)
    model.merge_adapter()
    merged = parts_of(model)
    with pytest.warns(UserWarning, match="[Aa]lready merged"):
        model.merge_adapter()
    assert_same_parts(model, merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="[Aa]lready unmerged"):
        model.unmerge_adapter()
    assert_same_parts(model, base)
    assert torch.equal(model(x), expected)


@pytest.mark.case("E4")
def test_two_active_adapters_of_peft_merge_to_their_sum() -> None:
    model, x = wrapped().eval(), inputs()
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that merging rounds
        model.merge_adapter(adapter_names=["default", "second"])
    error = (model(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.3
    for layer in model.modules():
        if hasattr(layer, "merged_adapters"):
            assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 0.3


# -- training that goes on -------------------------------------------------------------------


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def new_run(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


def steps(model: nn.Module, run: tuple[Any, Any], numbers: range) -> list[float]:
    """Steps on batches that are drawn at random, with dropout in the adapters."""
    optimizer, scheduler = run
    losses = []
    for _ in numbers:
        ids = torch.randint(0, 96, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_model() -> nn.Module:
    model = tiny_llama().train()
    qkern.quantize_model(model)
    return model


def own() -> nn.Module:
    model = base_model()
    torch.manual_seed(5)
    qkern.add_lora(model, r=4, lora_dropout=0.2)
    return model


def pefts() -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    return get_peft_model(base_model(), config)


def reload_own(directory: Path) -> nn.Module:
    model = base_model()
    qkern.load_adapter(model, directory)
    return model.train()


def reload_pefts(directory: Path) -> nn.Module:
    return PeftModel.from_pretrained(base_model(), directory, is_trainable=True).train()


@pytest.mark.case("E9")
@pytest.mark.parametrize(
    ("build", "save", "reload"),
    [
        (own, qkern.save_adapter, reload_own),
        (pefts, lambda model, path: model.save_pretrained(path), reload_pefts),
        (own, qkern.save, lambda p: qkern.load(p).train()),
    ],
    ids=["save_adapter", "peft", "save"],
)
def test_four_steps_are_two_and_two_after_a_reload(
    build: Any, save: Any, reload: Any, tmp_path: Path
) -> None:
    whole = build()
    run = new_run(whole)
    torch.manual_seed(6)
    expected = steps(whole, run, range(4))

    first = build()
    run = new_run(first)
    torch.manual_seed(6)
    losses = steps(first, run, range(2))
    save(first, tmp_path)
    names = [name for name, p in first.named_parameters() if p.requires_grad]
    torch.save([*(part.state_dict() for part in run), torch.get_rng_state()], tmp_path / "run.pt")

    torch.manual_seed(77)  # nothing may depend on the state of this process
    second = reload(tmp_path)
    assert [name for name, p in second.named_parameters() if p.requires_grad] == names
    run = new_run(second)
    optimizer, scheduler, generator = torch.load(tmp_path / "run.pt", weights_only=True)
    run[0].load_state_dict(optimizer)
    run[1].load_state_dict(scheduler)
    torch.set_rng_state(generator)
    losses += steps(second, run, range(2, 4))
    assert losses == expected
    for mine, theirs in zip(trained(second), trained(whole), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.case("E9")
def test_a_state_dict_of_the_whole_model_resumes_too(tmp_path: Path) -> None:
    whole = own()
    run = new_run(whole)
    torch.manual_seed(6)
    steps(whole, run, range(2))
    torch.save(whole.state_dict(), tmp_path / "model.pt")
    other = own()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    ids = token_ids()
    assert torch.equal(other.eval()(ids).logits, whole.eval()(ids).logits)


# -- new tokens ------------------------------------------------------------------------------

NEW = torch.tensor([[1, 5, 99, 100, 3]])  # of 101 tokens, where there were 96


def resized(*, tied: bool, add: bool = False) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=tied)
    qkern.quantize_model(model)
    if add:
        qkern.add_lora(model, r=4, init_lora_weights=False)
    torch.manual_seed(4)
    model.resize_token_embeddings(101, mean_resizing=False)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.case("E10")
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_model_is_saved_with_its_new_size(tied: bool, tmp_path: Path) -> None:
    model = resized(tied=tied, add=True)
    plain = tiny_llama(tie_word_embeddings=tied)
    qkern.quantize_model(plain)
    assert_same_parts(model, parts_of(plain))
    expected = logits(model, NEW)
    assert expected.shape == (1, 5, 101)
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path)
    assert loaded.config.vocab_size == 101
    assert torch.equal(logits(loaded, NEW), expected)
    shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shared is tied


@pytest.mark.case("E10")
def test_files_of_another_size_are_refused(tmp_path: Path) -> None:
    qkern.save(resized(tied=False), tmp_path)
    for target in (tiny_llama(), tiny_llama().to("meta")):
        with pytest.raises(qkern.CorruptFileError, match=r"embed_tokens.*101"):
            qkern.load(tmp_path, target)


@pytest.mark.case("E10")
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_a_resized_model_knows_the_number_of_tokens(
    tied: bool, tmp_path: Path
) -> None:
    model = resized(tied=tied, add=True)
    qkern.save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata()["qkern_tokens"] == "101"
    other = tiny_llama(tie_word_embeddings=tied)
    qkern.quantize_model(other)
    text = r"embeddings of 101 tokens, the model has 96: .*resize_token_embeddings\(101\)"
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.load_adapter(other, tmp_path)
    assert not any(isinstance(module, QLoRALinear) for module in other.modules())
    same = resized(tied=tied)
    qkern.load_adapter(same, tmp_path)
    assert torch.equal(logits(same, NEW), logits(model, NEW))
    qkern.load_adapter(other, tmp_path, force=True)
    assert torch.equal(logits(other, NEW[:, :2]), logits(model, NEW[:, :2])[..., :96])


@pytest.mark.case("E10")
def test_the_output_head_can_be_quantized_and_resized() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    model.lm_head = qkern.QuantizedLinear.from_linear(model.lm_head)
    before = model.lm_head.weight.dequantize()
    expected = logits(model, NEW[:, :2])
    model.resize_token_embeddings(101, mean_resizing=False)
    assert type(model.lm_head) is nn.Linear  # transformers makes a new one
    assert torch.equal(model.lm_head.weight[:96], before)
    torch.testing.assert_close(logits(model, NEW[:, :2])[..., :96], expected)


@pytest.mark.case("E10")
def test_trained_embeddings_of_peft_come_back_with_its_adapter(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = get_peft_model(resized(tied=False), config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(resized(tied=False), tmp_path).eval()
    assert torch.equal(logits(other, NEW), logits(model, NEW))


@pytest.mark.case("E10")
def test_new_tokens_are_trained_and_come_back_with_the_adapter(tmp_path: Path) -> None:
    model = resized(tied=False)
    qkern.add_lora(model, r=4, modules_to_save=["embed_tokens", "lm_head"])
    before = logits(model, NEW)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    model(input_ids=NEW, labels=NEW).loss.backward()
    optimizer.step()
    expected = logits(model, NEW)
    assert not torch.equal(expected, before)
    qkern.save_adapter(model, tmp_path)
    other = tiny_llama()
    qkern.quantize_model(other)
    with pytest.raises(qkern.AdapterMismatchError, match="101"):
        qkern.load_adapter(other, tmp_path)
    torch.manual_seed(9)  # other values for the new rows
    other.resize_token_embeddings(101, mean_resizing=False)
    qkern.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, NEW), expected)
