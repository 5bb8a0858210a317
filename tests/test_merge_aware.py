"""Training for a merge: values and gradients, merge without loss, what is refused, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import Stack, tiny_llama, token_ids

import qkern
from qkern.adapter_config import WEIGHTS_NAME
from qkern.checkpoint.reader import CheckpointReader
from qkern.merge_aware import linear, reference_linear
from qkern.merge_target import MERGE_KEY, MergeTarget
from qkern.reference import Parts

TARGETS: dict[str, Any] = {
    "nf4": "nf4",
    "nf4 search": MergeTarget(qkern.QuantFormat("nf4"), "search"),
    "nf4 fp32 scales": qkern.QuantFormat("nf4", double_quant=False),
    "fp4 128": qkern.QuantFormat("fp4", 128),
    "int8": qkern.QuantFormat("int8"),
    "int8_row": "int8_row",
}


def layer(merge_into: Any = "nf4", out: int = 96, width: int = 128, **lora: Any) -> nn.Linear:
    """With an adapter large enough to change many codes; widths of 172 have blocks across rows."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **lora}
    dense = nn.Linear(width, out)
    return qkern.QLoRALinear.from_linear(dense, merge_into=merge_into, **settings)


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(model: nn.Module, y: Tensor, *more: Tensor) -> list[Tensor]:
    inputs = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.float().square().sum(), [*inputs, *more]))


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


# -- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("width", [128, 172])
@pytest.mark.parametrize("target", TARGETS)
def test_values_and_gradients_are_those_of_plain_autograd_through_the_rounding(
    target: str, width: int
) -> None:
    made, x = layer(TARGETS[target], width=width), data(5, width).requires_grad_()
    made.bias.requires_grad_()
    exact = made.quantized_weight.dequantize() + made.scaling * (made.lora_B @ made.lora_A)
    fmt, method = made.merge_into.format, made.merge_into.method
    rounded = qkern.quantize(exact.detach(), fmt, method=method).dequantize()
    assert 0.02 < (rounded - exact).norm() / exact.norm() < 0.2 or "int8" in target
    through = exact + (rounded - exact).detach()
    expected = F.linear(x, through, made.bias)
    y = made(x)
    assert near(y, expected)
    reference = reference_linear(
        x,
        made.quantized_weight,
        made.bias,
        made.lora_A,
        made.lora_B,
        made.scaling,
        made.merge_into,
    )
    plain = gradients(made, expected, x)
    for other in (y, reference):
        for found, wanted in zip(gradients(made, other, x), plain, strict=True):
            assert near(found, wanted)


def test_gradients_of_gradients_are_those_of_plain_operations() -> None:
    made, x = layer(), data(3, 128).requires_grad_()
    adapter = (made.lora_A, made.lora_B)
    arguments = (made.quantized_weight, made.bias, *adapter, made.scaling, made.merge_into)
    found = []
    for product in (linear, reference_linear):
        y = product(x, *arguments)
        first = torch.autograd.grad(y.square().sum(), (x, *adapter), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, *adapter)))
    assert all(near(a, b, 1e-4) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.case("E5")
def test_a_merge_changes_no_bit_of_the_output_and_unmerge_restores_the_bytes(
    target: str, dtype: torch.dtype
) -> None:
    made = nn.Sequential(layer(TARGETS[target])).to(dtype)
    inputs = [data(tokens, 128, dtype=dtype) for tokens in (1, 7)]
    before = copy.deepcopy(made.state_dict())
    trained = [made(x) for x in inputs]
    loss = qkern.merge_adapter(made.eval(), min_kept=1.0)
    assert loss.kept == 1
    assert loss.layers[0].into == made[0].merge_into.format.quant_type
    assert made[0].weight.format.quant_type == made[0].merge_into.format.quant_type
    for x, y in zip(inputs, trained, strict=True):
        assert torch.equal(made(x), y)
    moved = copy.deepcopy(made)
    for each in (made, moved):
        qkern.unmerge_adapter(each)
        after = each.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_scales_that_8_bits_cannot_hold_are_merged_as_they_were_multiplied() -> None:
    dense = nn.Linear(128, 96)
    with torch.no_grad():
        dense.weight[::2] *= 1e-4
    made = qkern.QLoRALinear.from_linear(
        dense, double_quant=False, merge_into=qkern.QuantFormat("nf4"), r=2
    )
    model = nn.Sequential(made)
    expected = model(data(7, 128))
    qkern.merge_adapter(model.eval())
    assert not made.weight.format.double_quant
    assert torch.equal(model(data(7, 128)), expected)


def test_float64_computes_the_same_on_dense_weights() -> None:
    made, x = layer(), data(5, 128, dtype=torch.float64).requires_grad_()
    y = made(x)
    assert y.dtype == torch.float64
    assert near(y.float(), made(x.float()))
    for found, wanted in zip(gradients(made, y, x), gradients(made, made(x.float())), strict=False):
        assert near(found.float(), wanted)


def test_transforms_of_the_input_work_and_those_of_the_adapter_are_refused() -> None:
    made, x = layer(), data(3, 128).requires_grad_()
    expected = torch.autograd.grad(made(x).square().sum(), x)[0]
    assert near(torch.func.grad(lambda x: made(x).square().sum())(x.detach()), expected)

    def of_adapter(A: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"adapters.default.lora_A": A}, (x.detach(),)).sum()

    with pytest.raises(qkern.DTypeError, match=r"torch\.func"):
        torch.func.grad(of_adapter)(made.lora_A.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    made, x = layer(), data(5, 128).requires_grad_()
    expected = gradients(made, made(x), x)
    y = checkpoint(made, x, use_reentrant=reentrant)
    y.square().sum().backward()
    found = [made.lora_A.grad, made.lora_B.grad, x.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_rounds_inputs_and_never_the_sum() -> None:
    model, x = nn.Sequential(layer()), data(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].lora_A.grad.dtype == torch.float32
    qkern.merge_adapter(model.eval())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), y)
    assert torch.equal(model(x.bfloat16()), y)


def test_compiled_code_computes_the_same_in_one_graph() -> None:
    made, x = layer("nf4"), data(5, 128).requires_grad_()
    expected = made(x)
    y = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, expected)
    for found, wanted in zip(gradients(made, y, x), gradients(made, expected, x), strict=True):
        assert near(found, wanted)


@pytest.mark.parametrize("target", ["nf4", "nf4 search", "int8"])
def test_the_operator_is_well_formed(target: str) -> None:
    made = layer(TARGETS[target])
    weight, goal = made.quantized_weight, made.merge_into
    base = (*weight.parts, weight.format.quant_type, weight.format.blocksize, torch.float32)
    adapter = (made.lora_A.detach(), made.lora_B.detach(), made.scaling)
    kind = (goal.format.quant_type, goal.format.blocksize, goal.format.double_quant, goal.method)
    operator = torch.ops.qkern.quantize_merged.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*base, *adapter, *kind), test_utils=checks)
    packed, scales = operator(*base, *adapter, *kind)
    single = goal.format.replace(double_quant=False)
    merged = qkern.QuantizedTensor.from_parts(
        Parts(packed, scales, None, None), single, weight.shape, torch.float32
    )
    model = nn.Sequential(made)
    qkern.merge_adapter(model)
    assert torch.equal(made.quantized_weight.dequantize(), merged.dequantize())


def test_training_moves_the_loss_and_siblings_run_one_by_one() -> None:
    model = tiny_llama().train()
    qkern.quantize_model(model)
    qkern.add_lora(model, r=4, lora_alpha=16, merge_into="nf4")
    qkern.fuse_projections(model)
    ids = token_ids()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        expected = model(ids).logits
        qkern.merge_adapter(model, min_kept=1.0)
        assert torch.equal(model(ids).logits, expected)


# -- settings --------------------------------------------------------------------------------


def test_a_name_is_the_weights_own_format() -> None:
    dense = nn.Linear(128, 64)
    own = qkern.QLoRALinear.from_linear(dense, blocksize=128, double_quant=False, merge_into="nf4")
    assert own.merge_into == MergeTarget(qkern.QuantFormat("nf4", 128, double_quant=False))
    other = qkern.QLoRALinear.from_linear(dense, quant_type="int8", merge_into="nf4")
    assert other.merge_into == MergeTarget(qkern.QuantFormat("nf4"))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_searched_weight_is_searched_again_so_that_training_starts_at_it(
    *, double_quant: bool
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(256, 128)
    how = {"double_quant": double_quant, "method": "search"}
    base = qkern.QuantizedLinear.from_linear(dense, **how)
    made = qkern.QLoRALinear.from_linear(base, merge_into="nf4")
    assert made.merge_into.method == "search"
    assert near(made(data(4, 256)), base(data(4, 256)), 0.01)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lora_dropout": 0.1}, qkern.FormatError, "lora_dropout=0.1"),
        ({"lora_mode": "merged"}, qkern.FormatError, "lora_mode"),
        ({"merge_into": "nf3"}, qkern.FormatError, "nf3"),
        ({"merge_into": "mxfp4"}, qkern.FormatError, "mxfp4"),
        ({"merge_into": 4}, qkern.DTypeError, "got 4"),
    ],
)
def test_what_cannot_be_trained_for_is_refused_and_changes_nothing(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    with pytest.raises(error, match=words):
        qkern.add_lora(model, **{"merge_into": "nf4", **settings})
    assert not [m for m in model.modules() if isinstance(m, qkern.QLoRALinear)]


def test_it_can_begin_and_end_in_mid_training() -> None:
    model, x = Stack(), data(4, 256)
    plain = model(x)
    qkern.set_merge_into(model, "nf4")
    assert not torch.equal(model(x), plain)
    qkern.set_merge_into(model, None)
    assert torch.equal(model(x), plain)
    model.layers[1].lora_dropout = 0.1
    with pytest.raises(qkern.FormatError, match=r"layers\.1: .*lora_dropout"):
        qkern.set_merge_into(model, "nf4")
    assert model.layers[0].merge_into is None
    with pytest.raises(qkern.AdapterMismatchError, match="no adapter, or none is active"):
        qkern.set_merge_into(nn.Linear(2, 2), "nf4")


def test_nan_in_an_adapter_shows_in_the_output_and_is_not_merged() -> None:
    model = nn.Sequential(layer())
    with torch.no_grad():
        model[0].lora_B[3, 0] = float("nan")
    y = model(data(2, 128))
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    with pytest.raises(qkern.NonFiniteError, match="0: "):
        qkern.merge_adapter(model)


# -- files -----------------------------------------------------------------------------------


def aware_model(**lora: Any) -> nn.Module:
    model = tiny_llama()
    qkern.quantize_model(model)
    torch.manual_seed(1)
    qkern.add_lora(model, r=4, lora_alpha=2, init_lora_weights=False, **lora)
    return model


def test_a_saved_adapter_says_so_and_peft_reads_it(tmp_path: Path) -> None:
    model = aware_model(merge_into=TARGETS["nf4 search"], target_modules=["q_proj", "up_proj"])
    qkern.save_adapter(model, tmp_path)
    again = tiny_llama()
    qkern.quantize_model(again)
    qkern.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    again.model.layers[1].mlp.up_proj.lora_dropout = 0.1
    with pytest.raises(qkern.FormatError, match=r"lora_dropout=0\.1"):
        qkern.load_adapter(again, tmp_path)
    again.model.layers[1].mlp.up_proj.lora_dropout = 0.0
    base = tiny_llama()
    qkern.quantize_model(base)
    peft = PeftModel.from_pretrained(base, tmp_path)
    qkern.set_merge_into(model, None)
    with torch.no_grad():
        assert near(peft(token_ids()).logits, model(token_ids()).logits, 1e-4)
    qkern.save_adapter(model, tmp_path)
    qkern.load_adapter(again, tmp_path)
    assert again.model.layers[0].self_attn.q_proj.merge_into is None


@pytest.mark.parametrize("text", ["{", "[1]", '[{"layers": ["a"]}]', '[{"quant_type": "x"}]'])
def test_a_setting_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    qkern.save_adapter(aware_model(), tmp_path)
    file = tmp_path / WEIGHTS_NAME
    save_file(load_file(file), file, {"format": "pt", MERGE_KEY: text})
    with pytest.raises(qkern.CorruptFileError, match=MERGE_KEY):
        qkern.load_adapter(aware_model(), tmp_path, force=True)


def test_a_merge_from_file_to_file_is_that_of_the_model(tmp_path: Path) -> None:
    model = aware_model(merge_into="nf4")
    qkern.save(model, tmp_path / "base")
    qkern.save_adapter(model, tmp_path / "adapter")
    paths = (tmp_path / "base", tmp_path / "adapter")
    report = qkern.merge_checkpoint(*paths, tmp_path / "merged", quant_type="nf4", min_kept=1.0)
    assert report.kept == 1
    assert "trained for this rounding" in str(report)
    qkern.merge_adapter(model)
    name = "model.layers.0.mlp.up_proj.weight"
    found = CheckpointReader(tmp_path / "merged").read(name).dequantize(torch.float32)
    expected = model.get_submodule(name[:-7]).quantized_weight.dequantize()
    # sums in another order: a value between two codes may get the other one
    assert ((found - expected).abs() > 1e-6).float().mean() < 1e-3
    other = qkern.merge_checkpoint(*paths, tmp_path / "dense", dry_run=True)
    assert other.missed == "nf4 by absmax"
