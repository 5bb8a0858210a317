"""Adapters that start from their layer's weight: LoftQ, PiSSA, OLoRA; gaussian."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

import qkern
from qkern.lora_init import low_rank, start_from_weight


def weight(rows: int = 96, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def best_of(M: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return ((U[:, :r] * S[:r]) @ Vh[:r]).float()


def start_of(name: str, W: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    """What the base is with the adapter, and the base."""
    q = qkern.quantize(W, "nf4")
    how = {"r": 8, "scaling": 0.5, **settings}
    start = start_from_weight(name, q, W, **how)
    base = (q if start.weight is None else start.weight).dequantize(torch.float32)
    return base + how["scaling"] * (start.B @ start.A), base


def layers_of(model: nn.Module) -> dict[str, qkern.QLoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, qkern.QLoRALinear)}


# -- the factors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (20, 128), (7, 5)])
@pytest.mark.parametrize("scaling", [0.25, 1.0, 3.0])
def test_the_randomized_svd_is_near_the_best_and_the_scaling_taken_out(
    shape: tuple[int, int], scaling: float
) -> None:
    M, r = weight(*shape), 5
    A, B = low_rank(M, r, scaling)
    assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
    least = (M - best_of(M, r)).norm()
    assert (M - scaling * (B @ A)).norm() < 1.001 * least + 1e-6
    torch.testing.assert_close(A.norm(), B.norm(), rtol=1e-3, atol=0)


def test_it_is_the_same_on_every_run_and_draws_nothing_from_the_users_generators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", None)  # nor does it seed one and put it back
    state = torch.random.get_rng_state()
    first = low_rank(weight(), 4, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, low_rank(weight(), 4, 1.0)))


@pytest.mark.parametrize("scaling", [0.5, 1.0, 2.0])
def test_loftq_with_any_scaling_comes_nearer_with_more_iterations(scaling: float) -> None:
    W = weight()
    none = (W - qkern.quantize(W, "nf4").dequantize()).norm()
    errors = [
        (W - start_of("loftq", W, scaling=scaling, iterations=n)[0]).norm() for n in (1, 2, 5)
    ]
    assert errors[0] < 0.95 * none
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < 0.99 * errors[0]
    W8, q = weight(), qkern.quantize(weight(), "nf4")  # of one iteration: the best of rank r
    expected = (W8 - q.dequantize() - best_of(W8 - q.dequantize(), 8)).norm()
    assert errors[0] < 1.001 * expected


def test_one_iteration_of_loftq_leaves_the_base_and_none_is_a_plain_start() -> None:
    W = weight()
    _, base = start_of("loftq", W)
    assert torch.equal(base, qkern.quantize(W, "nf4").dequantize())
    assert start_from_weight("loftq", qkern.quantize(W), W, r=4, scaling=1.0, iterations=0) is None


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora"])
def test_the_largest_part_moves_from_the_base_to_the_adapter(name: str) -> None:
    W = best_of(weight(), 8) * 5 + weight()
    total, base = start_of(name, W)
    assert base.norm() < 0.8 * W.norm()
    plain = (W - qkern.quantize(W, "nf4").dequantize()).norm()
    limit = plain if "pissa" in name else 0.2 * W.norm()
    assert (W - total).norm() < limit  # a smaller base has smaller errors


def test_pissa_is_pefts_over_a_dense_layer() -> None:
    from peft import LoraConfig, get_peft_model

    dense = nn.Sequential(nn.Linear(128, 96, bias=False))
    W = best_of(weight(), 4) * 8 + weight()
    for name in ("pissa", "olora"):
        config = LoraConfig(r=4, lora_alpha=2, target_modules=["0"], init_lora_weights=name)
        with torch.no_grad():
            dense[0].weight.copy_(W)
        theirs = get_peft_model(nn.Sequential(dense[0]), config).base_model.model[0]
        mine = start_from_weight(name, qkern.quantize(W, "int8"), W, r=4, scaling=0.5)
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        torch.testing.assert_close(mine.B @ mine.A, product.detach(), rtol=1e-3, atol=1e-4)
        residual = theirs.base_layer.weight.detach()
        torch.testing.assert_close(mine.weight.dequantize(), residual, rtol=0, atol=0.01)


def test_gaussian_is_pefts() -> None:
    torch.manual_seed(0)
    layer = qkern.QLoRALinear.from_linear(nn.Linear(512, 64), r=8, init_lora_weights="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not layer.lora_B.any()


# -- layers and models -----------------------------------------------------------------------------


def test_a_layer_from_a_dense_one_knows_its_weight() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 96)
    x = torch.randn(4, 128)
    errors = {}
    for iterations in (0, 1, 5):
        layer = qkern.QLoRALinear.from_linear(
            dense, r=16, init_lora_weights="loftq", loftq_iterations=iterations
        )
        errors[iterations] = (layer(x) - dense(x)).norm().item()
        changed = layer.adapter.changed_base
        assert changed == ("loftq" if iterations == 5 else "")
    assert errors[5] < errors[1] < errors[0]


@pytest.mark.parametrize("source", ["model", "state dict", "directory", "file", "index"])
def test_a_model_takes_the_dense_weights_from_anywhere(source: str, tmp_path: Path) -> None:
    dense = tiny_llama()
    expected = dense(token_ids()).logits
    model = tiny_llama()
    qkern.quantize_model(model)
    far = (model(token_ids()).logits - expected).norm()
    given: object = dense
    if source == "state dict":
        given = dense.state_dict()
    elif source == "index":
        dense.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        given = tmp_path
    elif source != "model":
        save_file(dense.state_dict(), tmp_path / "model.safetensors")
        given = tmp_path if source == "directory" else str(tmp_path / "model.safetensors")
    qkern.add_lora(model, r=16, init_lora_weights="loftq", dense=given, use_dora=True)
    near = (model(token_ids()).logits - expected).norm()
    assert near < 0.8 * far
    assert all(layer.quantized_weight.format.double_quant for layer in layers_of(model).values())


def test_loftq_again_over_a_searched_base_searches_again() -> None:
    dense = nn.Sequential(nn.Linear(128, 96, bias=False))
    errors = {}
    for method in ("absmax", "search"):
        model = nn.Sequential(nn.Linear(128, 96, bias=False))
        model.load_state_dict(dense.state_dict())
        qkern.quantize_model(model, method=method)
        qkern.add_lora(
            model, r=8, init_lora_weights="loftq", dense=dense, loftq_iterations=3, method=method
        )
        layer = model[0]
        total = layer.weight.dequantize() + layer.delta()
        errors[method] = (dense[0].weight - total).norm()
    assert errors["search"] < errors["absmax"]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"init_lora_weights": "loftq"}, qkern.FormatError, "pass dense="),
        ({"init_lora_weights": "eva"}, qkern.FormatError, "'eva': known are"),
        ({"init_lora_weights": "pissa_niter_x"}, qkern.FormatError, "known are"),
        (
            {"init_lora_weights": "loftq", "dense": {}},
            qkern.AdapterMismatchError,
            r"q_proj: the dense weights have no model.layers.0.self_attn.q_proj.weight",
        ),
        (
            {"init_lora_weights": "loftq", "dense": "quantized"},
            qkern.AdapterMismatchError,
            "quantized in the source too",
        ),
        (
            {"init_lora_weights": "loftq", "dense": "another"},
            qkern.AdapterMismatchError,
            "not what this layer was quantized from",
        ),
        ({"init_lora_weights": "pissa", "r": 65}, qkern.FormatError, "at most 64, got 65"),
        ({"init_lora_weights": "pissa", "lora_alpha": -1}, qkern.FormatError, "positive scaling"),
        (
            {"init_lora_weights": "loftq", "dense": "own", "loftq_iterations": -1},
            qkern.FormatError,
            "0 or more",
        ),
        ({"init_lora_weights": "loftq", "dense": "/nowhere"}, FileNotFoundError, "/nowhere"),
    ],
)
def test_what_cannot_be_changes_nothing(
    settings: dict[str, object], error: type[Exception], text: str
) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if settings.get("dense") == "quantized":
        settings = {**settings, "dense": model}
    elif settings.get("dense") in ("another", "own"):
        other = tiny_llama()
        if settings["dense"] == "another":
            other.load_state_dict({k: v.flip(0) for k, v in other.state_dict().items()})
        settings = {**settings, "dense": other}
    with pytest.raises(error, match=text):
        qkern.add_lora(model, **settings)
    assert not layers_of(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("start", ["loftq", "pissa", "olora"])
def test_autocast_changes_no_start(start: str) -> None:
    dense = nn.Sequential(nn.Linear(128, 96))
    models = [copy.deepcopy(dense) for _ in range(2)]
    for model, cast in zip(models, (False, True), strict=True):
        qkern.quantize_model(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            qkern.add_lora(model, r=4, init_lora_weights=start, dense=dense, loftq_iterations=3)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("place", ["model", "dense"])
def test_a_start_from_the_weight_needs_its_values(place: str) -> None:
    dense = nn.Sequential(nn.Linear(128, 96))
    model = copy.deepcopy(dense)
    qkern.quantize_model(model)
    (model if place == "model" else dense).to("meta")
    with pytest.raises(qkern.DeviceError, match=r"0: .*on meta: load the model first"):
        qkern.add_lora(model, r=4, init_lora_weights="loftq", dense=dense)


@pytest.mark.parametrize(
    "places", ["[]", '{"0.weight": "../other.safetensors"}', '{"0.weight": 1}']
)
def test_an_index_that_names_no_files_is_refused(places: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {places}}}')
    model = nn.Sequential(nn.Linear(128, 96))
    qkern.quantize_model(model)
    with pytest.raises(qkern.CorruptFileError, match="weight_map is no object of file names"):
        qkern.add_lora(model, r=4, init_lora_weights="loftq", dense=tmp_path)


def test_a_base_under_other_adapters_stays() -> None:
    dense, model = tiny_llama(), tiny_llama()
    qkern.quantize_model(model)
    qkern.add_lora(model)
    settings = {"init_lora_weights": "loftq", "dense": dense, "adapter_name": "b"}
    with pytest.raises(qkern.AdapterMismatchError, match=r"whose base .* would change"):
        qkern.add_lora(model, **{**settings, "loftq_iterations": 3})
    assert qkern.adapter_names(model) == ["default"]
    qkern.add_lora(model, **settings)  # one iteration fits the base that is there


def test_a_base_stays_if_a_later_layer_cannot_start() -> None:
    """Layers that held an adapter before are changed in place, not replaced."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 40))
    qkern.quantize_model(model)
    qkern.add_lora(model)
    qkern.delete_adapter(model, "default")
    before = [layer.weight.packed for layer in model]
    with pytest.raises(qkern.FormatError, match=r"1: .* at most 40, got 50"):
        qkern.add_lora(model, r=50, init_lora_weights="pissa")
    assert all(layer.weight.packed is packed for layer, packed in zip(model, before, strict=True))
    assert not qkern.adapter_names(model)


@pytest.mark.parametrize("start", ["loftq", "pissa"])
def test_a_conv1d_has_its_dense_weight_the_other_way_round(start: str) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **special)).eval()
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    far = (model(token_ids()).logits - dense(token_ids()).logits).norm()
    qkern.add_lora(model, r=32, init_lora_weights=start, dense=dense)
    assert (model(token_ids()).logits - dense(token_ids()).logits).norm() < 0.8 * far


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.case("E3")
@pytest.mark.case("E8")
@pytest.mark.parametrize("name", ["pissa", "loftq"])
def test_an_adapter_that_changed_its_base_is_loaded_over_that_base_alone(
    name: str, tmp_path: Path
) -> None:
    def model(**settings: object) -> nn.Module:
        made = tiny_llama()
        qkern.quantize_model(made)
        if settings:
            qkern.add_lora(made, r=4, dense=tiny_llama(), loftq_iterations=2, **settings)
        return made

    mine = model(init_lora_weights=name)
    with torch.no_grad():
        for layer in layers_of(mine).values():
            layer.lora_B.mul_(1.1)
    expected = mine(token_ids()).logits
    qkern.save_adapter(mine, tmp_path / "adapter")
    with pytest.raises(qkern.AdapterMismatchError, match=f"initialized by {name}, which took"):
        qkern.load_adapter(model(), tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(qkern.AdapterMismatchError, match=f"initialized by {name}, which took"):
        qkern.merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "merged")
    again = model(init_lora_weights=name)  # made by the same call
    qkern.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(token_ids()).logits, expected)
    qkern.save(mine, tmp_path / "model")  # or kept
    assert torch.equal(qkern.load(tmp_path / "model")(token_ids()).logits, expected)
    qkern.merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    loaded = qkern.load(tmp_path / "model")
    assert {layer.adapter.changed_base for layer in layers_of(loaded).values()} == {name}
