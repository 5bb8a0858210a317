"""Gradients by every road, building under inference mode, sharing, and running out of memory."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bodies import same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from toys import Stack, tiny_llama, token_ids

import qkern
from qkern import reference
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.tensor import QuantizedTensor

# -- checkpointing ---------------------------------------------------------------------------


def trained_llama(*, reentrant: bool | None, autocast: bool) -> nn.Module:
    """After one backward pass, checkpointed in the way that is asked for, None for not at all."""
    model = tiny_llama()
    qkern.quantize_model(model)
    qkern.add_lora(model, r=4)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    return model


def adapter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.case("D13")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_adapters_their_gradients(reentrant: bool, autocast: bool) -> None:
    expected = adapter_gradients(trained_llama(reentrant=None, autocast=autocast))
    got = adapter_gradients(trained_llama(reentrant=reentrant, autocast=autocast))
    assert len(got) == 28
    for name, grad in got.items():
        assert (grad.norm() > 0) == name.endswith("lora_B")  # A's is zero while B is
        assert torch.equal(grad, expected[name])


@pytest.mark.case("D13")
def test_reentrant_checkpointing_warns_if_no_input_requires_a_gradient() -> None:
    stack, x = Stack(), torch.randn(4, 256)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        y = checkpoint(stack, x, use_reentrant=True)
    assert not y.requires_grad
    checkpoint(stack, x, use_reentrant=False).sum().backward()  # needs no such input
    assert all(layer.lora_B.grad.norm() > 0 for layer in stack.layers)


# -- derivatives -----------------------------------------------------------------------------


def layer_and_dense() -> tuple[QLoRALinear, object]:
    """A layer, and the same function of (x, bias, A, B) on its dequantized weight."""
    torch.manual_seed(0)
    layer = QLoRALinear.from_linear(nn.Linear(64, 16), r=4, init_lora_weights=False)
    layer.bias.requires_grad_(True)
    dense = layer.weight.dequantize()

    def function(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return reference.linear(x, dense.to(x.dtype), bias, A, B, layer.scaling)

    return layer, function


def apply(layer: QLoRALinear, *leaves: Tensor) -> Tensor:
    x, bias, A, B = leaves
    settings = {"lora_A": A, "lora_B": B, "scaling": layer.scaling}
    return qkern.linear(x, layer.quantized_weight, bias, **settings)


def leaves_of(layer: QLoRALinear, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    tensors = (torch.randn(3, 64), layer.bias, layer.lora_A, layer.lora_B)
    return tuple(t.detach().to(dtype).requires_grad_() for t in tensors)


@pytest.mark.case("D14")
def test_backward_and_double_backward_equal_the_dense_layers() -> None:
    layer, dense = layer_and_dense()
    leaves = leaves_of(layer)

    def derivatives(function: object) -> list[Tensor]:
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return [*first, *torch.autograd.grad(penalty, leaves)]

    got = derivatives(lambda *leaves: apply(layer, *leaves))
    for a, b in zip(got, derivatives(dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.case("D14")
def test_gradgradcheck_in_float64() -> None:
    layer, _ = layer_and_dense()
    leaves = leaves_of(layer, torch.float64)

    def function(*leaves: Tensor) -> Tensor:
        return apply(layer, *leaves).sin()

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.case("D14")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # forward mode's own
def test_forward_mode_equals_the_dense_layers() -> None:
    layer, dense = layer_and_dense()
    leaves = [leaf.detach() for leaf in leaves_of(layer)]
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    results = []
    for function in (lambda *leaves: apply(layer, *leaves), dense):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
            results.append(forward_ad.unpack_dual(function(*duals)))
    assert results[0].tangent is not None
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.case("D14")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # jvp's own
def test_transforms_equal_the_dense_layers() -> None:
    layer, dense = layer_and_dense()
    leaves = [leaf.detach() for leaf in leaves_of(layer)]
    functions = (lambda *leaves: apply(layer, *leaves), dense)

    def both(transform: object) -> None:
        got, expected = (transform(function) for function in functions)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    x, rest = leaves[0], leaves[1:]
    both(lambda f: torch.func.grad(lambda x: f(x, *rest).square().sum())(x))
    both(lambda f: torch.func.vmap(lambda x: f(x, *rest))(x))
    both(lambda f: torch.func.vjp(lambda x: f(x, *rest), x)[1](torch.ones(3, 16))[0])
    both(lambda f: torch.func.jvp(lambda x: f(x, *rest), (x,), (x,))[1])
    both(lambda f: torch.func.jacrev(lambda A: f(x, rest[0], A, rest[2]))(rest[1]))
    per_sample = (None, 0)
    both(
        lambda f: torch.func.vmap(
            torch.func.grad(lambda A, x: f(x, rest[0], A, rest[2]).square().sum()), per_sample
        )(rest[1], x)
    )


# -- inference mode --------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))


def assert_trains(model: nn.Module) -> None:
    expected = net()
    qkern.quantize_model(expected)
    torch.manual_seed(1)
    qkern.add_lora(expected, init_lora_weights=False)
    x = torch.randn(3, 128)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            if mine.requires_grad:
                mine.copy_(theirs)
    for module in (model, expected):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model(x), expected(x))
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.case("D15")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("steps", ["build", "build quantize", "quantize", "quantize add", "all"])
def test_what_inference_mode_made_can_be_trained(mode: type, steps: str) -> None:
    def run(step: str, work: object) -> object:
        if step in steps or steps == "all":
            with mode():
                return work()
        return work()

    model = run("build", net)
    run("quantize", lambda: qkern.quantize_model(model))
    run("add", lambda: qkern.add_lora(model, init_lora_weights=False))
    assert_trains(model)


@pytest.mark.case("D15")
def test_tensors_and_layers_of_inference_mode() -> None:
    with torch.inference_mode():
        dense = nn.Linear(128, 64)
        q = qkern.quantize(dense.weight)
        layer = QLoRALinear.from_linear(dense, init_lora_weights=False)
        plain = QuantizedLinear.from_linear(nn.Linear(128, 64))
        assert layer(torch.randn(3, 128)).is_inference()
    assert not any(part.is_inference() for part in q.parts)
    x = torch.randn(3, 128, requires_grad=True)
    (layer(x) + plain(x) + nn.functional.linear(x, q)).sum().backward()
    assert x.grad.norm() > 0
    assert layer.lora_A.grad.norm() > 0
    with torch.inference_mode():
        inside = layer(x)
    torch.testing.assert_close(inside.clone(), layer(x))


# -- tied and shared -------------------------------------------------------------------------


@pytest.mark.case("D17")
def test_a_shared_layer_stays_one_through_everything(tmp_path: Path) -> None:
    def shared_net() -> nn.ModuleDict:
        torch.manual_seed(0)
        shared = nn.Linear(64, 64)
        return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 64)})

    def one_layer(model: nn.Module) -> bool:
        return model["a"] is model["b"] and model["a"] is not model["c"]

    model, x = shared_net(), torch.randn(2, 64)
    qkern.quantize_model(model)
    assert one_layer(model)
    qkern.add_lora(model, r=2, init_lora_weights=False)
    assert one_layer(model)
    expected = model["b"](x)
    assert one_layer(copy.deepcopy(model))
    qkern.save(model, tmp_path)
    for target in (shared_net(), shared_net().to("meta")):
        loaded = qkern.load(tmp_path, target)
        assert one_layer(loaded)
        assert torch.equal(loaded["b"](x), expected)
    state = model.state_dict()
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    other = shared_net()
    qkern.quantize_model(other)
    qkern.load_adapter(other, tmp_path)
    assert one_layer(other)
    assert torch.equal(other["a"](x), expected)


@pytest.mark.case("D17")
def test_tied_embeddings_stay_one_storage(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    qkern.quantize_model(model)
    qkern.add_lora(model, r=2)
    qkern.save(model, tmp_path)
    for other in (model, copy.deepcopy(model), qkern.load(tmp_path)):
        head, embedding = other.lm_head.weight, other.model.embed_tokens.weight
        assert head.data_ptr() == embedding.data_ptr()


# -- out of memory, threads ------------------------------------------------------------------


@pytest.mark.case("D24")
@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("at", range(4))
def test_running_out_of_memory_leaves_each_layer_done_or_untouched(
    error: Exception, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    model, calls = build(), []
    original = QuantizedTensor.from_parts.__func__

    def failing(cls: type, *args: object) -> QuantizedTensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return original(cls, *args)

    x = torch.randn(2, 64)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedTensor, "from_parts", classmethod(failing))
        with pytest.raises(type(error), match="no memory"):
            qkern.quantize_model(model)
    kinds = [type(layer) for layer in model]
    assert kinds == [QuantizedLinear] * at + [nn.Linear] * (4 - at)
    assert all(layer.weight.requires_grad for layer in model[at:])
    assert all(layer.bias.requires_grad for layer in model[at:])
    assert model(x).isfinite().all()
    report = qkern.quantize_model(model)  # goes on where it stopped
    assert len(report.quantized) == 4
    expected = build()
    qkern.quantize_model(expected)
    assert torch.equal(model(x), expected(x))


@pytest.mark.case("D29")
def test_read_only_arrays_are_taken() -> None:
    values = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    expected = qkern.quantize(values.copy())
    values.flags.writeable = False
    assert qkern.quantize(values).packed.tobytes() == expected.packed.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of read-only memory
        tensor = torch.from_numpy(values)
    assert qkern.quantize(tensor).packed.numpy().tobytes() == expected.packed.tobytes()


@pytest.mark.case("D29")
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_buffer_that_changes_meanwhile_gives_some_codes_and_no_crash(quant_type: str) -> None:
    """Each code is of an old or a new value; a NaN that comes and goes may be found or not."""
    values = torch.randn(1 << 18)
    stop = threading.Event()

    def mutate() -> None:
        fills = (float("nan"), 1e30, 0.0, float("inf"), -1e-30)
        for i in range(1 << 30):
            if stop.is_set():
                return
            values[i * 1000 % (1 << 18) :][:1000] = fills[i % len(fills)]

    thread = threading.Thread(target=mutate)
    thread.start()
    try:
        for _ in range(30):
            for nonfinite in ("keep", "error"):
                try:
                    q = qkern.quantize(values, quant_type, nonfinite=nonfinite)
                except qkern.NonFiniteError:
                    continue
                assert q.dequantize().shape == values.shape
    finally:
        stop.set()
        thread.join()
    values.normal_()
    expected = reference.quantize(values, qkern.quantize(values, quant_type).format)
    assert same_bits(qkern.quantize(values, quant_type).packed, expected.packed)
