"""Several adapters over one base: switched, left out, one for each row, merged one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_net import assert_same_parts, parts_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import tiny_llama, token_ids

import qkern

ROWS = ["b", None, "a", "b"]


def net(names: str = "ab", **lora: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40, bias=False))
    qkern.quantize_model(model)
    settings = {"r": 3, "init_lora_weights": False, **lora}
    for seed, name in enumerate(names):
        torch.manual_seed(seed + 1)
        qkern.add_lora(model, adapter_name=name, **settings)
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 64)), generator=torch.Generator().manual_seed(3))


def output(model: nn.Module, name: str | None, x: Tensor) -> Tensor:
    if name is None:
        with qkern.disable_adapter(model):
            return model(x)
    qkern.set_adapter(model, name)
    return model(x)


def test_the_first_adapter_is_active_and_the_second_waits() -> None:
    first, both, x = net("a"), net(), inputs()
    assert torch.equal(both(x), first(x))
    assert qkern.adapter_names(both) == ["a", "b"]
    trained = [name for name, p in both.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".a.lora_" in name for name in trained)
    qkern.set_adapter(both, "b")
    trained = [name for name, p in both.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".b.lora_" in name for name in trained)
    assert not torch.equal(both(x), first(x))
    assert torch.equal(both[0].lora_A, both[0].adapters["b"].lora_A)


def test_two_adapters_of_different_layers_rank_and_kind() -> None:
    model, x = net("a"), inputs()
    qkern.add_lora(
        model, r=5, lora_alpha=3, use_rslora=True, target_modules=["0"], adapter_name="c",
        init_lora_weights=False,
    )  # fmt: skip
    expected = model(x)
    qkern.set_adapter(model, "c")
    assert (model[0].r, model[0].scaling) == (5, pytest.approx(3 / 5**0.5))
    assert not hasattr(model[2], "lora_A")  # the base alone
    only = net("")
    only[0] = model[0]
    assert torch.equal(model(x), only(x))
    qkern.set_adapter(model, "a", trainable=False)
    assert torch.equal(model(x), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_disabled_is_the_base_and_comes_back_after_an_error() -> None:
    model, x = net(), inputs()
    expected = model(x)
    with qkern.disable_adapter(model):
        assert torch.equal(model(x), net("")(x))
    with pytest.raises(qkern.ShapeError), qkern.disable_adapter(model):
        model(x[:, :3])
    assert torch.equal(model(x), expected)


def test_a_deleted_adapter_is_gone_and_its_name_free() -> None:
    model, x = net(), inputs()
    b = output(model, "b", x)
    qkern.set_adapter(model, "a")
    qkern.delete_adapter(model, "a")
    assert qkern.adapter_names(model) == ["b"]
    assert torch.equal(model(x), net("")(x))
    qkern.set_adapter(model, "b")
    assert torch.equal(model(x), b)
    qkern.delete_adapter(model, "b")
    qkern.add_lora(model, r=2, adapter_name="a")
    assert model[0].r == 2
    assert model[0].lora_A.requires_grad


@pytest.mark.parametrize("shape", [(4, 64), (4, 3, 64), (8, 2, 64), (12, 64)])
def test_each_row_gets_what_its_adapter_alone_gives(shape: tuple[int, ...]) -> None:
    """Of 8 or 12 rows for four names, two or three after one another have the same."""
    model, x, each = net(), inputs(*shape), shape[0] // 4
    with qkern.adapter_rows(model, ROWS):
        got = model(x)
    for i, name in enumerate(ROWS):
        rows = slice(i * each, (i + 1) * each)
        torch.testing.assert_close(got[rows], output(model, name, x[rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_gradients_of_rows_are_those_of_each_adapter_alone(checkpointed: bool | None) -> None:
    model, x = net(), inputs().requires_grad_()
    qkern.set_adapter(model, "a", trainable=["a", "b"])
    mixed = {"a": [2], "b": [0, 3]}
    with qkern.adapter_rows(model, ROWS):
        if checkpointed is None:
            y = model(x)
        else:
            y = checkpoint(model, x, use_reentrant=checkpointed)
        y.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(got) == 8
    grad_x = x.grad.clone()
    for key, rows in mixed.items():
        model.zero_grad()
        x.grad = None
        output(model, key, x)[rows].square().sum().backward()
        torch.testing.assert_close(grad_x[rows], x.grad[rows], rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if f".{key}." in name:
                torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_backward_outside_of_its_rows_is_refused(use_reentrant: bool) -> None:
    model, x = net(), inputs().requires_grad_()
    with qkern.adapter_rows(model, ROWS):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    with pytest.raises(qkern.AdapterMismatchError, match=r"backward\(\) inside of the same"):
        y.sum().backward()
    model(x).sum().backward()  # what comes next is not disturbed


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_calls_that_no_backward_repeats_change_nothing_of_it(use_reentrant: bool) -> None:
    """Such as those of a reference model between a loss and its backward."""
    model, x = net(), inputs().requires_grad_()
    grads = []
    for with_reference in (False, True):
        model.zero_grad()
        with qkern.adapter_rows(model, ROWS):
            y = checkpoint(model, x, use_reentrant=use_reentrant)
            if with_reference:
                with torch.no_grad(), qkern.disable_adapter(model):
                    model(x)
            y.square().sum().backward()
        grads.append(model[0].adapters["a"].lora_B.grad)
    assert torch.equal(*grads)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    with torch.no_grad(), qkern.adapter_rows(model, ROWS):
        model(x)
    y.sum().backward()


def test_what_is_set_within_stays() -> None:
    for within in (qkern.disable_adapter, lambda model: qkern.adapter_rows(model, ROWS)):
        model, x = net(), inputs()
        expected = output(net(), "b", x)
        with within(model):
            qkern.set_adapter(model, "b")
        assert torch.equal(model(x), expected)
        assert model[0].lora_A.requires_grad


def test_an_adapter_of_rows_is_not_deleted_under_them() -> None:
    model, x = net("abc"), inputs()
    with qkern.adapter_rows(model, ROWS):
        expected = model(x)
        with pytest.raises(qkern.AdapterMismatchError, match="rows of a batch have the adapter"):
            qkern.delete_adapter(model, "a")
        qkern.delete_adapter(model, "c")
        assert torch.equal(model(x), expected)


def test_one_name_of_what_trains_is_no_list_of_letters() -> None:
    model = net("a")
    qkern.add_lora(model, adapter_name="german")
    qkern.set_adapter(model, "a", trainable="german")
    assert model[0].active_adapter == "a"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".german." in name for name in trained)


def test_a_layer_without_an_active_adapter_says_what_it_has() -> None:
    model = net()
    qkern.delete_adapter(model, "a")
    with pytest.raises(AttributeError, match=r"set_adapter chooses one; it holds \['b'\]"):
        model[0].delta()


def test_rows_generate_what_each_adapter_generates() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    for name in "ab":
        qkern.add_lora(model, r=4, lora_alpha=64, init_lora_weights=False, adapter_name=name)
    ids = token_ids(3, 5)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with qkern.adapter_rows(model, ["a", None, "b"]):
        got = model.generate(ids, **settings)
        with_beams = model.generate(ids, num_beams=2, **settings)
    for i, name in enumerate(["a", None, "b"]):
        if name is None:
            with qkern.disable_adapter(model):
                expected = model.generate(ids[i : i + 1], **settings)
                beams = model.generate(ids[i : i + 1], num_beams=2, **settings)
        else:
            qkern.set_adapter(model, name)
            expected = model.generate(ids[i : i + 1], **settings)
            beams = model.generate(ids[i : i + 1], num_beams=2, **settings)
        assert torch.equal(got[i : i + 1], expected)
        assert torch.equal(with_beams[i : i + 1], beams)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (["a", "c"], qkern.AdapterMismatchError, r"no adapter 'c'.*its adapters: \['a', 'b'\]"),
        ([], qkern.ShapeError, "a name or None for each row"),
        ("ab", qkern.ShapeError, "a name or None for each row"),
    ],
)
def test_rows_that_cannot_be(rows: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text), qkern.adapter_rows(net(), rows):
        pass


def test_a_batch_that_does_not_fit_its_rows_names_the_layer() -> None:
    model = net()
    with (
        qkern.adapter_rows(model, ["a", "b", None]),
        pytest.raises(qkern.ShapeError, match=r"^0 got x of \(4, 64\), adapter_rows has 3 rows"),
    ):
        model(inputs())


@pytest.mark.parametrize("name", ["", "a.b", "a b", "items", "training"])
def test_names_that_no_module_can_have(name: str) -> None:
    model = net("")
    with pytest.raises(qkern.FormatError, match="cannot be an adapter's name"):
        qkern.add_lora(model, adapter_name=name)
    assert not any(isinstance(m, qkern.QLoRALinear) for m in model.modules())


@pytest.mark.parametrize("change", [qkern.set_adapter, qkern.delete_adapter])
def test_an_unknown_adapter_is_named_with_those_that_there_are(change: object) -> None:
    with pytest.raises(qkern.AdapterMismatchError, match=r"no adapter 'aa'; nearest: .*\['a', "):
        change(net(), "aa")


# -- files -------------------------------------------------------------------------------------


def test_each_adapter_has_its_own_files(tmp_path: Path) -> None:
    model, x = net(), inputs()
    expected = {name: output(model, name, x) for name in "ab"}
    for name in "ab":
        qkern.save_adapter(model, tmp_path / name, adapter_name=name)
    fresh = net("")
    qkern.load_adapter(fresh, tmp_path / "b", adapter_name="x")
    qkern.load_adapter(fresh, tmp_path / "a", adapter_name="y")
    assert torch.equal(fresh(x), expected["b"])  # the first is active
    assert torch.equal(output(fresh, "y", x), expected["a"])
    qkern.load_adapter(fresh, tmp_path / "b", adapter_name="y")  # over what is there
    assert torch.equal(fresh(x), expected["b"])
    with pytest.raises(qkern.AdapterMismatchError, match="no adapter 'z' to save"):
        qkern.save_adapter(model, tmp_path / "z", adapter_name="z")


def test_a_model_directory_holds_one_adapter(tmp_path: Path) -> None:
    model, x = net(), inputs()
    with pytest.raises(qkern.AdapterMismatchError, match=r"one adapter, the model has \['a', 'b'"):
        qkern.save(model, tmp_path)
    qkern.set_adapter(model, "b")
    qkern.delete_adapter(model, "a")
    qkern.save(model, tmp_path)
    dense = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40, bias=False))
    assert torch.equal(qkern.load(tmp_path, dense)(x), model(x))


def test_the_way_out_of_a_refused_save_brings_back_every_adapter(tmp_path: Path) -> None:
    model, x = net("abc"), inputs()
    expected = {name: output(model, name, x) for name in "abc"}
    way = r"qkern\.save_adapter\(.*qkern\.delete_adapter\(model, name\).*qkern\.load_adapter\("
    with pytest.raises(qkern.AdapterMismatchError, match=way):
        qkern.save(model, tmp_path)
    for name in "ab":
        qkern.save_adapter(model, tmp_path / name, adapter_name=name)
        qkern.delete_adapter(model, name)
    qkern.save(model, tmp_path / "model")
    dense = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 40, bias=False))
    again = qkern.load(tmp_path / "model", dense)
    assert torch.equal(output(again, "default", x), expected["c"])
    for name in "ab":
        qkern.load_adapter(again, tmp_path / name, adapter_name=name)
        assert torch.equal(output(again, name, x), expected[name])


# -- merging -----------------------------------------------------------------------------------


@pytest.mark.case("E4")
def test_one_adapter_is_merged_at_a_time() -> None:
    model, x = net(lora_alpha=1).eval(), inputs()
    before, expected = parts_of(model), model(x)
    for change in (
        lambda: qkern.set_adapter(model, "b"),
        lambda: qkern.delete_adapter(model, "b"),
        lambda: qkern.add_lora(model, adapter_name="c"),
        lambda: qkern.adapter_rows(model, ROWS).__enter__(),
        lambda: qkern.disable_adapter(model).__enter__(),
    ):
        qkern.merge_adapter(model)
        with pytest.raises(qkern.AdapterMismatchError, match="unmerge_adapter first"):
            change()
        qkern.unmerge_adapter(model)
    assert_same_parts(model, before)
    assert torch.equal(model(x), expected)


@pytest.mark.case("E4")
def test_merge_twice_unmerge_without_merge_and_with_rows_in_use() -> None:
    model = net(lora_alpha=1)
    before = parts_of(model)
    with pytest.raises(qkern.AdapterMismatchError, match="is not merged"):
        qkern.unmerge_adapter(model)
    with (
        qkern.adapter_rows(model, ROWS),
        pytest.raises(qkern.AdapterMismatchError, match="leave qkern"),
    ):
        qkern.merge_adapter(model)
    with (
        qkern.disable_adapter(model),
        pytest.raises(qkern.AdapterMismatchError, match="no adapter, or none is active"),
    ):
        qkern.merge_adapter(model)
    assert_same_parts(model, before)
    qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="merged already"):
        qkern.merge_adapter(model)
    qkern.unmerge_adapter(model)
    assert_same_parts(model, before)


@pytest.mark.case("E4")
def test_a_merged_adapter_is_not_trained_in_silence() -> None:
    model, x = net(lora_alpha=1).train(), inputs()
    qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="0 is in training with a merged"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    qkern.unmerge_adapter(model)
    model.train()(x).sum().backward()
