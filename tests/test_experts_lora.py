"""``add_lora(target_parameters=...)``: adapters of stacked experts, PEFT's numbers and files."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, output
from chat_model import save_chat_model, write_chats
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qkern
from qkern.errors import AdapterMismatchError, FormatError, NonFiniteError, ShapeError
from qkern.experts import QuantizedExperts
from qkern.experts_lora import QLoRAExperts
from qkern.tensor import QuantizedTensor

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MOE = ["Mixtral", "Qwen3-MoE", "gpt-oss"]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BOTH = [UP, DOWN]
COMMON: dict[str, Any] = {"r": 3, "lora_alpha": 6}
KINDS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "with linear layers": {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    "the second alone, rslora": {
        "target_modules": [],
        "target_parameters": [DOWN],
        "use_rslora": True,
    },
    "one layer, patterns": {
        "target_modules": ["o_proj"],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", DOWN],
        "rank_pattern": {"gate_up_proj": 5},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 9},
    },
}


def quantized(name: str = "Mixtral", **settings: Any) -> nn.Module:
    model = BY_NAME[name].small()
    qkern.quantize_model(model, **settings)
    return model


def dense_of(model: nn.Module) -> nn.Module:
    """Stock layers and experts of the values that a quantized model multiplies."""
    dense = BY_NAME[model.name].small()
    for path, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    return dense


def base_and_dense(name: str) -> tuple[nn.Module, nn.Module]:
    model = quantized(name)
    model.name = name
    return model, dense_of(model)


def adapted(name: str = "Mixtral", seed: int = 1, **lora: Any) -> nn.Module:
    model = quantized(name)
    add(model, seed, **lora)
    return model


def add(model: nn.Module, seed: int = 1, **lora: Any) -> list[str]:
    torch.manual_seed(seed)
    settings = {**COMMON, **KINDS["both"], "init_lora_weights": False, **lora}
    return qkern.add_lora(model, **settings)


def experts_of(model: nn.Module, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model.eval())


def train(model: nn.Module, steps: int = 3) -> list[float]:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(output(model).flatten(0, 1), torch.arange(24) % 7)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def edit(directory: Path, change: Any = None, **settings: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if change is not None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")


# -- PEFT's numbers and files ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_trained_here_it_gives_the_same_logits_in_peft_over_dense_weights(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, dense = base_and_dense(name)
    base = logits(model)
    qkern.add_lora(model, **COMMON, **KINDS[kind])
    assert torch.equal(logits(model), base)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    assert not torch.equal(expected, base)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    own = quantized(name)
    for _ in range(2):  # the second time over itself
        qkern.load_adapter(own, tmp_path)
        assert torch.equal(logits(own), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_trained_in_peft_over_dense_weights_it_gives_the_same_logits_here(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, dense = base_and_dense(name)
    theirs = get_peft_model(dense, LoraConfig(task_type="CAUSAL_LM", **COMMON, **KINDS[kind]))
    train(theirs)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    qkern.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    qkern.save_adapter(model, again)  # the same entries under the same keys
    found, written = (load_file(p / "adapter_model.safetensors") for p in (again, tmp_path))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in found)


@pytest.mark.parametrize("name", MOE)
def test_the_same_start_gives_pefts_losses(name: str, tmp_path: Path) -> None:
    own, dense = base_and_dense(name)
    add(own, **KINDS["with linear layers"])
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    counts = {sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (own, theirs)}
    assert len(counts) == 1
    torch.testing.assert_close(train(own, 5), train(theirs, 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MOE)
def test_gradients_equal_fp64_over_dense_sums(name: str) -> None:
    """Of A, B and the input, against autograd over W + s B A in the class's own forward."""
    model, dense = base_and_dense(name)
    dense.set_experts_implementation("eager")  # grouped_mm has no fp64
    add(model)
    experts, exact = experts_of(model), experts_of(dense).double()
    torch.manual_seed(2)
    x, index = torch.randn(13, 64), torch.randint(0, 4, (13, 2))
    index[index == 2] = 1  # an expert without rows
    weights = torch.rand(13, 2)
    parts = experts.adapters["default"]
    leaves = [x, *(f for p in parts.values() for f in (p.lora_A, p.lora_B))]
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sums = {}
    for i, (parameter, part) in enumerate(parts.items()):
        A, B = copies[1 + 2 * i : 3 + 2 * i]
        delta = part.scaling * B @ A
        held = getattr(exact, parameter).detach()
        sums[parameter] = held + (delta.mT if exact.is_transposed else delta)
    wanted = torch.func.functional_call(exact, sums, (copies[0], index, weights.double()))
    found = experts(x.requires_grad_(), index, weights)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), leaves)
    expected = torch.autograd.grad(wanted.square().sum(), copies)
    for grad, want in zip(grads, expected, strict=True):
        assert (grad.double() - want).norm() <= 1e-5 * want.norm()
        assert want.any()


def test_starts_are_those_of_pefts_one_layer() -> None:
    """Deviations of the factors, of A and B, for each kind of start."""
    for init, expected in (
        (True, (64**-0.5 / 3**0.5, 0.0)),
        (False, (64**-0.5 / 3**0.5, (3 * 8) ** -0.5 / 3**0.5)),
        ("gaussian", (1 / 3, 0.0)),
    ):
        model = adapted("Qwen3-MoE", init_lora_weights=init)
        part = experts_of(model).adapters["default"]["gate_up_proj"]
        assert part.lora_A.shape == (8, 3, 64)
        assert part.lora_B.shape == (8, 128, 3)
        found = (float(part.lora_A.detach().std()), float(part.lora_B.detach().std()))
        assert found == pytest.approx(expected, rel=0.05)


def test_one_expert_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    sizes = {**BY_NAME["Mixtral"].sizes, "num_local_experts": 1, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = BY_NAME["Mixtral"]._build(sizes).eval()
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    for path, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    add(model)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_files_have_pefts_keys_and_settings(tmp_path: Path) -> None:
    qkern.save_adapter(adapted("Mixtral"), tmp_path)
    shapes = {
        k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    stem = "base_model.model.model.layers.0.mlp.experts."
    assert {k: v for k, v in shapes.items() if k.startswith(stem)} == {
        f"{stem}base_layer.lora_A.weight": (12, 64),
        f"{stem}base_layer.lora_B.weight": (320, 12),
        f"{stem}lora_A.weight": (12, 160),
        f"{stem}lora_B.weight": (64, 12),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == sorted(BOTH)


# -- what add_lora does ----------------------------------------------------------------------


def test_without_the_argument_experts_get_nothing() -> None:
    model = quantized()
    names = qkern.add_lora(model)
    assert len(names) == 8
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert not any("experts" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MOE)
def test_names_classes_and_what_is_trainable(name: str) -> None:
    model = quantized(name)
    before = type(experts_of(model)).__bases__[1]
    names = qkern.add_lora(model, r=2, target_parameters=BOTH)
    assert names[8:] == [f"model.layers.{i}.mlp.{end}" for i in (0, 1) for end in BOTH]
    experts = experts_of(model)
    assert isinstance(experts, QLoRAExperts)
    assert isinstance(experts, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained)
    assert len(trained) == 2 * (8 + 4)
    assert "r=2" in repr(experts)
    groups = qkern.lora_plus_groups(model, lr=1e-4, ratio=4)
    assert sorted(len(group["params"]) for group in groups) == [12, 12]
    report = qkern.quantize_model(model)  # once more: nothing new is found
    assert not any("lora" in row.name for row in report.rows)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, AdapterMismatchError, "nearest: experts.g"),
        ({"target_parameters": ["gate.weight"]}, AdapterMismatchError, "matches no quantized"),
        ({"target_parameters": UP}, FormatError, "a list of names"),
        ({"lora_dropout": 0.1}, FormatError, "have no lora_dropout"),
        ({"use_dora": True}, FormatError, "have no use_dora"),
        ({"init_lora_weights": "pissa"}, FormatError, "have no init_lora_weights"),
        ({"lora_mode": "merged"}, FormatError, "have no lora_mode"),
        ({"merge_into": "nf4"}, FormatError, "have no merge_into"),
        ({"r": 0}, ShapeError, "rank"),
        ({"init_lora_weights": "other"}, FormatError, "init_lora_weights"),
        ({"rank_pattern": {"up": 2}}, AdapterMismatchError, "matches none"),
        ({"target_parameters": []}, AdapterMismatchError, "target_modules"),
    ],
)
def test_what_is_refused_changes_nothing(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = quantized()
    model.lm_head.requires_grad_(True)
    with pytest.raises(error, match=message):
        add(model, **settings)
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert model.lm_head.weight.requires_grad
    assert not qkern.adapter_names(model)


def test_dense_experts_are_refused_with_what_to_do() -> None:
    model = quantized(exclude="experts")
    with pytest.raises(AdapterMismatchError, match="quantize_model"):
        add(model)


def test_experts_of_some_layers_are_named_by_their_paths(tmp_path: Path) -> None:
    model = quantized(exclude="layers.1.mlp.experts")
    assert len(add(model)) == 2
    qkern.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.0.mlp.{end}" for end in sorted(BOTH)]


def test_linear_layers_first_and_experts_by_a_second_call(tmp_path: Path) -> None:
    model = quantized()
    assert len(qkern.add_lora(model, r=2, target_modules=["q_proj"])) == 2
    assert len(qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)) == 4
    assert sum(p.requires_grad for p in model.parameters()) == 12
    with pytest.raises(AdapterMismatchError, match="have an adapter 'default' already"):
        qkern.add_lora(model, r=2, target_modules=[], target_parameters=[UP])
    qkern.save_adapter(model, tmp_path)
    other = quantized()
    qkern.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_layers_of_another_start_and_experts_are_one_file(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, target_modules=["q_proj"], init_lora_weights="olora")
    qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)
    train(model, 1)
    qkern.save(model, tmp_path)
    assert torch.equal(logits(qkern.load(tmp_path)), logits(model))


def test_layers_with_dropout_and_experts_are_no_file_of_pefts(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, target_modules=["q_proj"], lora_dropout=0.1)
    qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)
    with pytest.raises(AdapterMismatchError, match="layers differ"):
        qkern.save_adapter(model, tmp_path)


def test_a_forward_that_was_replaced_is_refused() -> None:
    model = quantized()
    experts_of(model, 1).forward = lambda *inputs: inputs[0]
    with pytest.raises(FormatError, match="forward was replaced"):
        add(model)


def test_another_computation_of_a_weight_is_refused_not_passed_over() -> None:
    model = adapted()
    config = LoraConfig(r=2, target_modules=[], target_parameters=[DOWN])
    wrapped = get_peft_model(model, config)
    with pytest.raises(AdapterMismatchError, match="use one of the two"):
        logits(wrapped)


# -- how it is computed ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_no_dense_stack_is_made_forward_or_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(name)

    def refuse(*_: Any, **__: Any) -> Any:
        msg = "a dense copy"
        raise RuntimeError(msg)

    monkeypatch.setattr(QuantizedTensor, "dequantize", refuse)
    output(model.train()).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast_agree_with_fp32(name: str, dtype: torch.dtype) -> None:
    model = adapted(name)
    experts = experts_of(model)
    torch.manual_seed(2)
    x, index = torch.randn(9, 64), torch.randint(0, 4, (9, 2))
    inputs = (index, torch.rand(9, 2))
    expected = experts(x, *inputs).detach()
    with torch.autocast("cpu", dtype):
        cast = experts(x, *inputs)
    half = adapted(name).to(dtype)
    for adapter in half.modules():
        if hasattr(adapter, "lora_A") and adapter is not experts_of(half):
            adapter.float()
    found = experts_of(half)(x.to(dtype), inputs[0], inputs[1].to(dtype))
    assert found.dtype == dtype
    for y in (cast, found):
        assert (y.detach().float() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model = adapted()
    experts, parts = experts_of(model), list(experts_of(model).adapters.parameters())
    torch.manual_seed(2)
    x = torch.randn(9, 64, requires_grad=True)
    inputs = (x, torch.randint(0, 4, (9, 2)), torch.rand(9, 2))
    expected = torch.autograd.grad(experts(*inputs).square().sum(), [x, *parts])
    y = checkpoint(experts, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    for got, want in zip([x, *parts], expected, strict=True):
        assert torch.equal(got.grad, want)


def test_compiled_without_a_break() -> None:
    experts = experts_of(adapted("gpt-oss"))
    torch.manual_seed(2)
    inputs = (torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2))
    expected = experts(*inputs)
    wanted = torch.autograd.grad(expected.square().sum(), list(experts.adapters.parameters()))
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(experts.adapters.parameters()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- several adapters ------------------------------------------------------------------------


def two(name: str = "Mixtral") -> nn.Module:
    model = adapted(name, adapter_name="a")
    add(model, 2, adapter_name="b", target_parameters=[UP], r=2)
    return model


def test_named_adapters_are_switched_disabled_and_deleted() -> None:
    model, base = two(), logits(quantized())
    a = logits(model)
    assert torch.equal(a, logits(adapted()))
    qkern.set_adapter(model, "b")
    b = logits(model)
    only = quantized()
    add(only, 2, target_parameters=[UP], r=2)
    assert torch.equal(b, logits(only))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".adapters.b.gate_up_proj." in n for n in trained)
    with qkern.disable_adapter(model):
        assert torch.equal(logits(model), base)
    qkern.delete_adapter(model, "b")
    assert torch.equal(logits(model), base)
    qkern.set_adapter(model, "a")
    assert torch.equal(logits(model), a)


@pytest.mark.parametrize("arch", MOE)
def test_each_row_gets_what_its_adapter_alone_gives(arch: str) -> None:
    model = two(arch)
    rows = {"a": 0, None: 1}
    with qkern.adapter_rows(model, list(rows)):
        mixed = logits(model)
    for name, row in rows.items():
        if name is None:
            with qkern.disable_adapter(model):
                alone = logits(model)
        else:
            alone = logits(model)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], logits(model)[1])


def test_an_adapter_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    model = two()
    qkern.set_adapter(model, "b")
    expected = logits(model)
    qkern.save_adapter(model, tmp_path, adapter_name="b")
    other = adapted()
    qkern.load_adapter(other, tmp_path, adapter_name="b")
    qkern.set_adapter(other, "b")
    assert torch.equal(logits(other), expected)


# -- a module's life -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model = adapted(name)
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(experts_of(other), QLoRAExperts)
        assert torch.equal(logits(other), expected)
        train(other, 1)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)
    fresh = adapted(name, seed=3)
    assert not torch.equal(logits(fresh), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        quantized(name).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", MOE)
def test_a_directory_holds_base_and_adapter(name: str, tmp_path: Path) -> None:
    model = adapted(name, **KINDS["with linear layers"])
    qkern.save(model, tmp_path)
    opened = qkern.load(tmp_path)
    assert torch.equal(logits(opened), logits(model))
    assert isinstance(experts_of(opened), QLoRAExperts)


# -- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["with linear layers", "the second alone, rslora"])
@pytest.mark.parametrize("name", MOE)
def test_a_merge_adds_it_and_unmerging_restores_the_bytes(name: str, kind: str) -> None:
    model = adapted(name, **KINDS[kind])
    expected, experts = logits(model), experts_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    down = experts.adapters["default"]["down_proj"]
    delta = down.product()
    exact = experts.down_proj.dequantize() + (delta.mT if experts.is_transposed else delta)
    loss = qkern.merge_adapter(model)
    names = {row.name: row for row in loss.layers}
    assert "model.layers.0.mlp.experts.down_proj" in names
    row = names["model.layers.0.mlp.experts.down_proj"]
    error = (experts.down_proj.dequantize() - exact).norm() / delta.norm()
    assert row.kept == pytest.approx(float(1 - error), abs=1e-4)
    assert (experts.down_proj.dequantize() - exact).norm() < 0.12 * exact.norm()
    assert (logits(model) - expected).norm() < 0.5 * expected.norm()
    with pytest.raises(AdapterMismatchError, match="merged"):
        qkern.merge_adapter(model)
    with pytest.raises(AdapterMismatchError, match="in training with a merged adapter"):
        train(model, 1)
    qkern.unmerge_adapter(model.eval())
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_is_not_finite_merges_nothing() -> None:
    model = adapted(**KINDS["with linear layers"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        experts_of(model, 1).adapters["default"]["down_proj"].lora_A[2, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        qkern.merge_adapter(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if "lora_" not in key)
    assert not experts_of(model).merged


def test_a_merged_adapter_is_saved_with_its_base(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    qkern.merge_adapter(model)
    qkern.save_adapter(model, tmp_path)
    other = quantized()
    qkern.load_adapter(other, tmp_path)  # of the base of before the merge
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("name", MOE)
def test_merged_to_dense_experts_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    model = adapted(name, **KINDS["with linear layers"])
    expected, like = logits(model), BY_NAME[name].small()
    loss = qkern.merge_to_dense(model)
    assert len(loss.layers) == 8
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in like.named_modules()
    }
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_merged_to_dense_in_16_bits_biases_are_cast_too() -> None:
    model = adapted("gpt-oss", **KINDS["the second alone, rslora"])
    expected = logits(model)
    qkern.merge_to_dense(model, dtype=torch.bfloat16)
    assert {p.dtype for p in experts_of(model).parameters()} == {torch.bfloat16}
    found = logits(model.to(torch.bfloat16)).float()
    assert (found - expected).norm() < 5e-2 * expected.norm()


def test_merged_to_dense_experts_without_the_adapter_stay_quantized() -> None:
    model = adapted(target_parameters=["layers.1.mlp.experts.down_proj"])
    expected = logits(model)
    loss = qkern.merge_to_dense(model)
    assert [row.name for row in loss.layers] == ["model.layers.1.mlp.experts.down_proj"]
    assert [isinstance(experts_of(model, i), QuantizedExperts) for i in (0, 1)] == [True, False]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_merged_to_dense_where_nothing_but_experts_is_quantized() -> None:
    model = quantized(exclude="*.self_attn.*")
    add(model)
    expected = logits(model)
    assert len(qkern.merge_to_dense(model).layers) == 4
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="no quantized layer"):
        qkern.merge_to_dense(model)


def test_transformers_dequantizes_after_a_merge_alone(tmp_path: Path) -> None:
    from qkern.integrations.transformers import QkernConfig

    BY_NAME["Mixtral"].small().save_pretrained(tmp_path)
    kind = type(BY_NAME["Mixtral"].small())
    model = kind.from_pretrained(tmp_path, quantization_config=QkernConfig())
    add(model)
    with pytest.raises(AdapterMismatchError, match="has an adapter, which would be lost"):
        model.dequantize()
    qkern.merge_adapter(model)
    expected = logits(model)
    dense = model.dequantize()
    assert type(experts_of(dense)) is type(experts_of(BY_NAME["Mixtral"].small()))
    assert not any("lora_" in name for name, _ in dense.named_parameters())
    assert (logits(dense) - expected).norm() < 2e-6 * expected.norm()


def test_training_for_a_merge_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be trained for a merge"):
        qkern.set_merge_into(adapted(), "nf4")


# -- MXFP4, which is (experts, out, in) in a class that holds (experts, in, out) ---------------


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss with experts in its own format, as ``qkern convert --to qkern`` leaves them."""
    path = tmp_path_factory.mktemp("mxfp4")
    source, model, tensors = path / "source", BY_NAME["gpt-oss"].small(), {}
    source.mkdir()
    model.config.save_pretrained(source)
    torch.manual_seed(4)
    for key, tensor in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        count, columns, rows = tensor.shape
        blocks = (count, rows, columns // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 123, blocks, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["GptOssForCausalLM"]
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    qkern.convert_checkpoint(source, path / "q", "qkern")
    return path / "q"


def test_adapters_over_mxfp4_are_pefts_over_the_dense_model(mxfp4: Path, tmp_path: Path) -> None:
    model, dense = qkern.load(mxfp4), BY_NAME["gpt-oss"].small()
    experts = experts_of(model)
    assert experts.down_proj.format.quant_type == "mxfp4"
    assert experts.is_transposed
    dense.load_state_dict(
        {
            k: (p.dequantize().mT if isinstance(p, QuantizedTensor) else p.detach())
            for k, p in model.named_parameters()
        },
        strict=False,
    )
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    add(model)
    train(model, 2)
    expected = logits(model)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="nothing is quantized to mxfp4"):
        qkern.merge_adapter(model)
    assert torch.equal(logits(model), expected)
    qkern.merge_to_dense(model)
    assert experts.down_proj.shape == (4, 96, 64)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


# -- strict loading --------------------------------------------------------------------------

STEM = "base_model.model.model.layers.1.mlp.experts."


def change_of(key: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[STEM + key] = change(tensors[STEM + key]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.pop(f"{STEM}lora_A.weight"), {}, "needs lora_A"),
        (None, {"target_parameters": None}, r"no quantized layer model\.layers\.0\.mlp\.experts"),
        (None, {"target_parameters": [UP]}, r"no quantized layer .*\.base_layer"),
        (None, {"target_parameters": [*BOTH, "experts.other"]}, "has 'experts.other'"),
        (None, {"target_parameters": UP}, "a list of names is needed"),
        (None, {"lora_dropout": 0.5}, "have no lora_dropout"),
        (change_of("lora_A.weight", lambda A: A[:-1]), {}, "needs lora_A"),
        (change_of("lora_A.weight", lambda A: A[:, :-1]), {}, r"\(out, in, r\) = \(64, 159, 3\)"),
        (change_of("lora_B.weight", lambda B: B[:-1]), {}, r"\(out, in, r\) = \(63, 160, 3\)"),
    ],
)
def test_files_that_do_not_fit_change_nothing(
    change: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    edit(tmp_path, change, **settings)
    model = quantized()
    with pytest.raises(qkern.QkernError, match=message):
        qkern.load_adapter(model, tmp_path)
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert torch.equal(logits(model), logits(quantized()))


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    sizes = {**BY_NAME["Mixtral"].sizes, "num_local_experts": 5}
    model = BY_NAME["Mixtral"]._build(sizes)
    qkern.quantize_model(model)
    with pytest.raises(AdapterMismatchError, match=r"12 rows of lora_A .* which has 5 experts"):
        qkern.load_adapter(model, tmp_path)


def test_one_weight_without_an_entry_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(target_parameters=[DOWN]), tmp_path)
    edit(tmp_path, target_parameters=BOTH)
    with pytest.raises(AdapterMismatchError, match=r"gate_up_proj, the file has no entry .*base_l"):
        qkern.load_adapter(quantized(), tmp_path)


def test_another_base_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    model = quantized(double_quant=False)
    with pytest.raises(AdapterMismatchError, match="other quantized weights"):
        qkern.load_adapter(model, tmp_path)
    qkern.load_adapter(model, tmp_path, force=True)
    assert isinstance(experts_of(model), QuantizedExperts)


# -- fine-tuning -----------------------------------------------------------------------------


def test_finetune_trains_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qkern.cli import main

    sizes = {**BY_NAME["Mixtral"].sizes, "vocab_size": 259, "max_position_embeddings": 512}
    torch.manual_seed(0)
    path = save_chat_model(tmp_path / "model", BY_NAME["Mixtral"]._build(sizes))
    data, out = write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    targets = ["--target-modules", "", "--target-parameters", ", ".join(BOTH)]
    settings = ["--steps", "2", "--r", "2", "--dtype", "float32", "--device", "cpu"]
    where = [str(path), str(data), "--output", str(out)]
    assert main(["finetune", *where, *settings, *targets, "--json"]) == 0
    capsys.readouterr()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], sorted(BOTH))
    assert len(load_file(out / "adapter_model.safetensors")) == 8
