"""The layers through a module's life: state dicts, copies, casts, moves, optimizers."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from bodies import same_bits
from format_cases import FORMATS
from peft import LoraConfig, get_peft_model
from small_net import adapted, assert_same_parts, inputs, parts_of, quantized
from torch import Tensor, nn
from toys import Stack, tiny_llama, token_ids

import qkern
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.tensor import QuantizedTensor

# -- copies ----------------------------------------------------------------------------------


def storages(model: nn.Module) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts_pointers(model)}


def parts_pointers(model: nn.Module) -> list[Tensor]:
    weights = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    return [part for weight in weights for part in weight.parts if part is not None]


@pytest.mark.case("D5")
@pytest.mark.parametrize("build", [quantized, adapted])
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_copies_are_equal_and_deep_ones_apart(
    build: object, quant_type: str, double_quant: bool
) -> None:
    model, x = build(0, quant_type=quant_type, double_quant=double_quant), inputs()
    expected = model(x)
    deep, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (deep, pickled, saved):
        assert torch.equal(other(x), expected)
        assert not storages(other) & storages(model)
        assert other.up.path == "up"
        assert_same_parts(other, parts_of(model))
    shallow = copy.copy(model.up.weight)
    assert shallow.packed.data_ptr() == model.up.weight.packed.data_ptr()
    assert torch.equal(copy.copy(model)(x), expected)


RECEIVER = """
import pickle, sys
import torch
model, x = pickle.load(sys.stdin.buffer)
with torch.no_grad():
    sys.stdout.buffer.write(pickle.dumps(model(x)))
"""


@pytest.mark.case("D5")
def test_another_process_gets_the_same_outputs() -> None:
    model, x = Stack(), torch.randn(3, 256)
    paths = (Path(qkern.__file__).parents[1], Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", RECEIVER],
        input=pickle.dumps((model, x)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert torch.equal(pickle.loads(run.stdout), model(x))


@pytest.mark.case("D5")
def test_a_model_in_shared_memory_is_sent_by_reference() -> None:
    model, x = adapted(), inputs()
    expected = model(x)
    assert not model.up.weight.is_shared()
    model.share_memory()
    assert model.up.weight.is_shared()
    assert all(part.is_shared() for part in parts_pointers(model))
    assert torch.equal(model(x), expected)
    received = pickle.loads(bytes(ForkingPickler.dumps(model)))  # as a queue between processes
    assert torch.equal(received(x), expected)
    with torch.no_grad():
        received.up.weight.packed.zero_()
    assert not torch.equal(model(x), expected)


# -- casts and moves -------------------------------------------------------------------------

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "data": lambda m: [setattr(p, "data", p.data.to(torch.float32)) for p in m.parameters()],
}


@pytest.mark.case("D7")
@pytest.mark.parametrize("casts", list(itertools.permutations(CASTS, 2)))
def test_casts_change_what_is_computed_never_the_bytes(casts: tuple[str, str]) -> None:
    model = adapted()
    before = parts_of(model)
    for name in casts:
        CASTS[name](model)
        dtypes = {p.dtype for p in model.parameters()}
        assert len(dtypes) == 1
        (dtype,) = dtypes
        assert model.up.weight.dtype == dtype
        y = model(inputs().to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert_same_parts(model, before)
    again = quantized()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    assert_same_parts(again, before)


@pytest.mark.case("D7")
def test_the_dtype_of_a_transformers_model_is_the_one_it_computes_in() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.dtype == model.model.layers[0].mlp.up_proj.weight.dtype == dtype


@pytest.mark.case("D7")
def test_float64_computes_with_the_float32_value() -> None:
    model, x = adapted(), inputs()
    single = model(x)
    double = model.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    weight = model.up.weight
    assert torch.equal(weight.dequantize(), weight.dequantize(torch.float32).double())
    assert torch.equal(model.float()(x), single)


@pytest.mark.case("D7")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_casts_to_integers_are_torchs_error_and_change_nothing(dtype: torch.dtype) -> None:
    model, x = adapted(), inputs()
    before, expected = parts_of(model), model(x)
    with pytest.raises(TypeError, match="floating point"):
        model.to(dtype)
    with pytest.raises(RuntimeError, match="floating point"):  # the adapter comes first
        model.up.type(dtype)
    with pytest.raises(qkern.DTypeError):
        quantized().up.type(dtype)
    assert_same_parts(model, before)
    assert torch.equal(model(x), expected)


@pytest.mark.case("D7")
def test_casts_to_8_bit_floats_are_refused() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 4, bias=False))
    with pytest.raises(qkern.DTypeError, match="float8"):
        layer.to(torch.float8_e4m3fn)
    assert layer.weight.dtype == torch.float32


@pytest.mark.case("D8")
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_through_meta_and_back(quant_type: str, double_quant: bool) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    model, x = adapted(0, **settings), inputs()
    expected, state = model(x), copy.deepcopy(model.state_dict())
    down = QuantizedLinear(copy.deepcopy(model.down.weight)).state_dict()
    model.cpu().to("cpu").to(torch.device("cpu"))
    assert torch.equal(model(x), expected)
    empty = model.to("meta")
    assert all(p.is_meta for p in empty.parameters())
    shapes = {key: value.shape for key, value in empty.state_dict().items()}
    assert shapes.keys() == state.keys()
    assert all(shapes[k] == state[k].shape for k in state if "quant_state" not in k)
    with pytest.raises(qkern.StateDictError, match="assign=True"):
        QuantizedLinear(empty.down.weight).load_state_dict(down)
    with pytest.raises(NotImplementedError, match="meta"):
        empty.to("cpu")
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(x), expected)


@pytest.mark.case("D9")
@pytest.mark.parametrize("build", [quantized, adapted])
def test_eval_and_train_change_no_byte_and_no_number(build: object) -> None:
    model, x = build(), inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = []
    for training in (True, False, True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            outputs.append(model(x).detach())
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert model.state_dict().keys() == before.keys()
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.case("D10")
def test_quantizing_twice() -> None:
    model = quantized()
    before = parts_of(model)
    report = qkern.quantize_model(model, "int8")
    assert_same_parts(model, before)
    assert {row.reason for row in report.rows} == {"was quantized before"}
    qkern.add_lora(model)
    qkern.quantize_model(model)
    assert isinstance(model.up, QLoRALinear)
    assert_same_parts(model, before)
    with pytest.raises(qkern.FormatError, match="quantized already"):
        QuantizedLinear.from_linear(model.up)
    with pytest.raises(qkern.FormatError, match="adapter already"):
        QLoRALinear.from_linear(model.up)
    with pytest.raises(qkern.DTypeError, match="quantized already"):
        qkern.quantize(model.up.weight)
    with pytest.raises(qkern.DTypeError, match="quantized already"):
        qkern.quantize(model.up.weight.data)


# -- optimizers and counts -------------------------------------------------------------------


@pytest.mark.case("D11")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
def test_an_optimizer_of_all_parameters_leaves_packed_weights(optimizer: object) -> None:
    model = adapted()
    before, A = parts_of(model), model.up.lora_A.detach().clone()
    step = optimizer(model.parameters())
    model(inputs()).square().sum().backward()
    step.step()
    assert_same_parts(model, before)
    assert not torch.equal(model.up.lora_A, A)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{name}.adapters.default.lora_{x}" for name in ("up", "down") for x in "AB"
    }


@pytest.mark.case("D11")
def test_a_packed_weight_never_requires_a_gradient() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 4))
    for ask in (
        layer.requires_grad_,
        lambda: nn.Parameter(layer.weight),
        layer.weight.requires_grad_,
    ):
        with pytest.raises(qkern.FrozenWeightError, match="add_lora"):
            ask()
    assert not layer.weight.requires_grad


@pytest.mark.case("D12")
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_counts_are_those_of_the_dense_model(
    quant_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, model = tiny_llama(), tiny_llama()
    qkern.quantize_model(model, quant_type)
    total = sum(p.numel() for p in dense.parameters())
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.num_parameters() == dense.num_parameters() == total
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 192 * 128
    assert qkern.memory_footprint(model) < qkern.memory_footprint(dense)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    lora = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name)
    assert peft_model.get_nb_trainable_parameters() == (lora, total + lora)
    peft_model.print_trainable_parameters()
    assert f"{lora:,} || all params: {total + lora:,}" in capsys.readouterr().out
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer.weight, QuantizedTensor)
    assert peft_model(token_ids()).logits.isfinite().all()
