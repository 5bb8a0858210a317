"""The bitsandbytes plug-in: its operators on a CPU, what is saved, and how it is switched on."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern.errors import DTypeError, FormatError, MissingDependencyError, ShapeError
from qkern.integrations import bitsandbytes as plugin
from qkern.integrations import bitsandbytes_kernels
from qkern.ops import host

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnbf

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest relative error of a product, by the dtype of its inputs: a few of its roundings.
NEAR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# bitsandbytes 0.50 decodes the first four with the scales of other blocks where it has AVX-512;
# then odd sizes, one dimension, three, and none.
SHAPES = [(64, 96), (300, 400), (3, 4304), (64, 64), (7, 33), (7,), (8,), (3, 5, 7), (0, 8), ()]


@pytest.fixture
def enabled() -> Iterator[None]:
    plugin.enable()
    yield
    plugin.disable()


@pytest.fixture
def own() -> Iterator[None]:
    """bitsandbytes by itself, whatever ran before."""
    plugin.disable()
    yield
    plugin.disable()


def scaled(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values whose scale differs much between neighbours: wrong scales show."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def decoded(packed: Tensor, state: bnbf.QuantState, dtype: torch.dtype) -> Tensor:
    """``code * absmax`` in fp32, rounded once: what a weight is."""
    shape, absmax = torch.Size(state.shape), state.absmax
    if state.nested:
        groups = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * groups + state.offset
    codes = packed.reshape(-1).view(torch.uint8)
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[: shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: shape.numel()]
    return (state.code[nibbles.long()] * scales).reshape(shape).to(dtype)


def quantized(w: Tensor, **settings: Any) -> tuple[Tensor, bnbf.QuantState]:
    settings = {"quant_type": "nf4", "blocksize": 64} | settings
    packed, state = bnbf.quantize_4bit(w, **settings)
    return packed, state


def tensors_of(packed: Tensor, state: bnbf.QuantState) -> dict[str, Tensor]:
    """All that is written."""
    return {"packed": packed} | state.as_dict(packed=True)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: object) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, (where, key)
        assert ours[key].shape == value.shape, (where, key)
        assert bytes_of(ours[key]) == bytes_of(value), (where, key)


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def relative(result: Tensor, expected: Tensor) -> float:
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).norm() / expected.norm())


# -- switching -------------------------------------------------------------------------------


def test_enable_and_disable_take_turns(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = quantized(scaled(8, 64))
    calls = []
    decode = host.dequantize_into
    monkeypatch.setattr(host, "dequantize_into", lambda *a, **k: calls.append(1) or decode(*a, **k))
    counts = []
    for switch in (plugin.enable, plugin.enable, plugin.disable, plugin.disable, plugin.enable):
        switch()
        calls.clear()
        assert torch.equal(bnbf.dequantize_4bit(packed, state), decoded(packed, state, state.dtype))
        counts.append((plugin.is_enabled(), len(calls)))
    assert counts == [(True, 1), (True, 1), (False, 0), (False, 0), (True, 1)]


def test_operators_are_the_kernels_and_all_of_them_exist(enabled: None) -> None:
    assert set(plugin.OPERATORS) == set(bitsandbytes_kernels.KERNELS)
    assert plugin.enable() == plugin.OPERATORS
    assert plugin.status().is_on


def test_a_layer_keeps_what_it_knows_of_the_processor(own: None) -> None:
    layer = bnb.nn.Linear4bit(64, 64)
    before = layer.support_avx512bf16_for_cpu
    plugin.enable()
    assert layer.support_avx512bf16_for_cpu is False
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu is False
    plugin.disable()
    assert layer.support_avx512bf16_for_cpu == before


# -- operators -------------------------------------------------------------------------------


def test_dequantize_is_exact_for_every_shape(enabled: None) -> None:
    settings = itertools.product(SHAPES, DTYPES, ("nf4", "fp4"), (32, 64, 128, 4096), (0, 1))
    for shape, dtype, quant_type, blocksize, nested in settings:
        packed, state = quantized(
            scaled(*shape, dtype=dtype),
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=bool(nested),
        )
        result = bnbf.dequantize_4bit(packed, state)
        where = (shape, dtype, quant_type, blocksize, nested)
        assert result.shape == shape, where
        assert torch.equal(result, decoded(packed, state, dtype)), where


def test_the_same_bytes_are_written_with_and_without(own: None) -> None:
    inputs = {
        f"{shape} {dtype}": scaled(*shape, dtype=dtype) for shape in SHAPES for dtype in DTYPES
    }
    inputs["transposed"] = scaled(96, 64).t()
    inputs["strided"] = scaled(64, 96)[:, ::3]
    inputs["zeros"] = torch.zeros(3, 50)
    inputs["nonfinite"] = scaled(4, 100)
    inputs["nonfinite"][1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    storages = (torch.uint8, torch.bfloat16, torch.float32)
    for (name, w), quant_type in itertools.product(inputs.items(), ("nf4", "fp4")):
        for nested, storage in itertools.product((False, True), storages):
            if (w.numel() + 1) // 2 % storage.itemsize or (nested and name == "nonfinite"):
                continue
            if nested and not w.numel():  # the mean of nothing
                continue
            settings = {"quant_type": quant_type, "quant_storage": storage}
            settings["compress_statistics"] = nested
            plugin.disable()
            theirs = tensors_of(*quantized(w, **settings))
            plugin.enable()
            assert_same(tensors_of(*quantized(w, **settings)), theirs, (name, settings))


def test_products_are_those_of_the_decoded_weight(enabled: None) -> None:
    sizes = ((1, 50, 100), (3, 64, 128), (2, 5, 7), (40, 33, 96))
    settings = itertools.product(sizes, DTYPES, (False, True), (False, True), ("nf4", "fp4"))
    for (M, N, K), dtype, nested, with_bias, quant_type in settings:
        W, x, bias = (
            scaled(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, K), (2, M, K), (N,)])
        )
        packed, state = quantized(W, quant_type=quant_type, compress_statistics=nested)
        y = bnb.matmul_4bit(x, packed, state, bias=bias if with_bias else None)
        expected = x.double() @ decoded(packed, state, dtype).double().t()
        where = (M, N, K, dtype, nested, with_bias, quant_type)
        assert y.dtype == dtype, where
        assert relative(y, expected + bias.double() * with_bias) < NEAR[dtype], where


def test_codes_stored_in_another_dtype_multiply_the_same(enabled: None) -> None:
    W, x = scaled(64, 96), scaled(3, 96, seed=1)
    results = [
        bnb.matmul_4bit(x, *quantized(W, quant_storage=storage))
        for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    ]
    assert all(torch.equal(results[0], result) for result in results)


def test_scales_in_a_code_of_ones_own_are_decoded_by_it(enabled: None) -> None:
    W, x = scaled(64, 512), scaled(3, 512, seed=1)
    packed, state = quantized(W, compress_statistics=True)
    state.state2.code = state.state2.code * 0.5
    y = bnb.matmul_4bit(x, packed, state)
    assert relative(y, x.double() @ decoded(packed, state, W.dtype).double().t()) < 1e-6


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gemv_reads_both_layouts(enabled: None, quant_type: str) -> None:
    W, x = scaled(64, 128), scaled(3, 128, seed=1)
    packed, state = quantized(W, quant_type=quant_type)
    y = bnbf.gemv_4bit(x, packed, state=state)
    weight = decoded(packed, state, W.dtype)
    assert relative(y, x @ weight.t()) < 1e-6
    out = torch.full((3, 64), torch.nan)
    assert torch.equal(bnbf.gemv_4bit(x, packed, out=out, state=state), y)

    packed, repacked = bnbf._convert_weight_packed_for_cpu(packed, state)
    scales = repacked.absmax.t().reshape(-1).float()  # rounded to bf16 by the repacking
    weight = weight / state_scales(state, W) * scales.repeat_interleave(64).reshape(W.shape)
    assert relative(bnbf.gemv_4bit(x, packed, state=repacked), x @ weight.t()) < 1e-6


def state_scales(state: bnbf.QuantState, W: Tensor) -> Tensor:
    """fp32 scales of W, each value its own, from W: ``state`` has lost them."""
    return W.reshape(-1, state.blocksize).abs().amax(1).repeat_interleave(64).reshape(W.shape)


def test_results_go_into_out(enabled: None) -> None:
    packed, state = quantized(scaled(64, 96))
    expected = decoded(packed, state, torch.float32)
    strided = torch.full((96, 64), torch.nan).t()
    for out in (torch.full((64, 96), torch.nan), strided):
        result = bnbf.dequantize_4bit(
            packed, absmax=state.absmax, out=out, blocksize=64, quant_type="nf4"
        )
        assert result is out
        assert torch.equal(out, expected)
    codes, state8 = bnbf.quantize_blockwise(expected)
    out = torch.full((64, 96), torch.nan)
    bnbf.dequantize_blockwise(codes, state8, out=out)
    assert torch.equal(out, bnbf.dequantize_blockwise(codes, state8))


def test_int8_rows_are_those_of_bitsandbytes(own: None) -> None:
    for dtype, shape, threshold in itertools.product(
        (torch.float16, torch.float32), ((5, 100), (1, 64), (64, 33), (0, 8)), (0.0, 2.0, 100.0)
    ):
        A = scaled(*shape, dtype=dtype)
        if threshold == 2.0 and A.numel():
            A[0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
        plugin.disable()
        theirs = bnbf.int8_vectorwise_quant(A.clone(), threshold)
        plugin.enable()
        ours, before = bnbf.int8_vectorwise_quant(A, threshold), A.clone()
        assert torch.equal(A, before)
        for one, other in zip(ours, theirs, strict=True):
            assert one is other or torch.equal(one, other), (dtype, shape, threshold)


def test_a_batch_of_int8_rows(enabled: None) -> None:
    A = scaled(3, 4, 8)
    codes, absmax, columns = bnbf.int8_vectorwise_quant(A, 4.0)
    flat = bnbf.int8_vectorwise_quant(A.reshape(12, 8), 4.0)
    assert columns.numel()
    for one, other in zip((codes.reshape(12, 8), absmax, columns), flat, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_linear8bit_is_the_same(own: None, threshold: float) -> None:
    x, results = scaled(5, 100, dtype=torch.float16), []
    for switch in (plugin.disable, plugin.enable):
        switch()
        torch.manual_seed(0)
        layer = bnb.nn.Linear8bitLt(100, 64, has_fp16_weights=False, threshold=threshold)
        layer = layer.to("cpu").half().eval()
        with torch.no_grad():
            results.append((layer(x), layer.state.CB, layer.state.SCB))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_refused(enabled: None) -> None:
    packed, state = quantized(scaled(64, 96))
    ops = torch.ops.bitsandbytes
    kind = (64, "nf4")
    with pytest.raises(ShapeError, match="6208 values in blocks of 64 need 3104 packed codes"):
        ops.dequantize_4bit(packed, state.absmax, *kind, [64, 97], torch.float32)
    with pytest.raises(ShapeError, match="need 96 absmax, got 95"):
        ops.gemm_4bit(scaled(1, 96), packed, [64, 96], state.absmax[:95], *kind)
    with pytest.raises(ShapeError, match="multiplies inputs"):
        ops.gemm_4bit(scaled(1, 64), packed, [64, 96], state.absmax, *kind)
    with pytest.raises(DTypeError, match="float64"):
        ops.dequantize_4bit(packed, state.absmax, *kind, [64, 96], torch.float64)
    with pytest.raises(FormatError, match="'nf4' or 'fp4', got 'int8'"):
        ops.dequantize_4bit(packed, state.absmax, 64, "int8", [64, 96], torch.float32)
    with pytest.raises(ShapeError, match="out must have the shape"):
        ops.dequantize_4bit.out(
            packed, state.absmax, *kind, [64, 96], torch.float32, torch.empty(64, 95)
        )


def test_operators_keep_their_contract_with_torch(enabled: None) -> None:
    W, x = scaled(64, 96), scaled(3, 96, seed=1)
    packed, state = quantized(W)
    ops, weight = torch.ops.bitsandbytes, (state.absmax, 64, "nf4")
    check = torch.library.opcheck
    check(ops.quantize_4bit.default, (W, 64, "nf4", torch.uint8))
    check(ops.dequantize_4bit.default, (packed, *weight, [64, 96], torch.float32))
    check(ops.gemm_4bit.default, (x, packed, [64, 96], *weight))
    check(ops.gemv_4bit.default, (x, packed, [64, 96], state.absmax, state.code, 64))
    check(ops.int8_vectorwise_quant.default, (W,))


# -- layers ----------------------------------------------------------------------------------


def linear4bit(in_features: int, out_features: int, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"quant_type": "nf4"} | settings
    layer = bnb.nn.Linear4bit(in_features, out_features, **settings)
    layer.weight.data.copy_(scaled(out_features, in_features))
    return layer.to("cpu")


# Rows that are no multiple of 32, and rows of codes that end within a block: bitsandbytes refuses
# both in eval mode where it repacks.
@pytest.mark.parametrize(("in_features", "out_features"), [(96, 50), (100, 64), (128, 64)])
def test_layers_agree_with_their_weight_in_training_and_eval(
    enabled: None, in_features: int, out_features: int
) -> None:
    for nested, dtype in itertools.product((False, True), DTYPES):
        layer = linear4bit(
            in_features, out_features, compress_statistics=nested, compute_dtype=dtype
        )
        weight = decoded(layer.weight.data, layer.weight.quant_state, dtype).double()
        for x in (scaled(1, in_features), scaled(2, 3, in_features)):
            expected = x.to(dtype).double() @ weight.t() + layer.bias.double()
            for mode in (True, False):
                y = layer.train(mode)(x)
                assert relative(y, expected) < 2 * NEAR[dtype], (nested, dtype, mode)


def test_eval_leaves_the_checkpoint_and_the_gradient_as_they_were(enabled: None) -> None:
    for nested in (False, True):
        layer = linear4bit(128, 64, compress_statistics=nested)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with torch.no_grad():
            layer.eval()(scaled(2, 128))
        assert_same(layer.state_dict(), before, nested)
        x = scaled(2, 128).requires_grad_()
        layer.train()(x).sum().backward()
        weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
        assert relative(x.grad, weight.sum(0).expand(2, -1)) < 1e-6


def test_gradients_are_those_of_the_decoded_weight(enabled: None) -> None:
    layer = linear4bit(96, 50)
    x, grad = scaled(3, 96).requires_grad_(), scaled(3, 50, seed=2)
    layer(x).backward(grad)
    weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
    assert relative(x.grad, grad @ weight) < 1e-6
    assert relative(layer.bias.grad, grad.sum(0)) < 1e-6


def test_layers_that_ran_before_keep_their_results(own: None) -> None:
    layer, x = linear4bit(128, 64, compute_dtype=torch.bfloat16).eval(), scaled(3, 128)
    with torch.no_grad():
        before = layer(x)  # repacks, where the processor has bf16 instructions
        plugin.enable()
        assert relative(layer(x), before) < 1e-2
        plugin.disable()
        assert torch.equal(layer(x), before)


def test_a_layer_compiles_in_one_piece(enabled: None) -> None:
    layer, x = linear4bit(96, 50).eval(), scaled(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_embeddings_and_qkern_read_the_same_weight(enabled: None) -> None:
    table = bnb.nn.EmbeddingNF4(10, 64)
    dense = table.weight.data.clone()
    table.to("cpu")
    rows = torch.tensor([3, 9, 3])
    expected = qkern.dequantize(qkern.quantize(dense, "nf4", double_quant=False))[rows]
    assert relative(table(rows), expected) < 0.02  # its scales are double-quantized


def test_transformers_and_peft_above_it_compute_with_the_decoded_weights(
    enabled: None, tmp_path: Path
) -> None:
    """in_features of 96 in blocks of 64: what bitsandbytes alone decodes wrongly or refuses."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bits, device_map="cpu", dtype=torch.float32
    )
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
        dense.get_submodule(name).weight.data.copy_(weight)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert relative(model.eval()(ids).logits, dense.eval()(ids).logits) < 1e-5
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_the_example_runs(own: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "bitsandbytes_plugin.py"), run_name="__main__")
    assert "largest error of a weight" in capsys.readouterr().out


# -- the entry point -------------------------------------------------------------------------

START = """
import os, sys
import bitsandbytes
from qkern.integrations import bitsandbytes as plugin
print(plugin.is_enabled(), plugin.status().is_on, "qkern.ops" in sys.modules)
os.environ["QKERN_BITSANDBYTES"] = "1"
print(plugin.status().is_on)
bitsandbytes._import_backends()
print(plugin.is_enabled())
"""


def test_installed_it_does_nothing_unless_the_variable_asks(tmp_path: Path) -> None:
    """The entry point of pyproject.toml, called by bitsandbytes."""
    entry = (ROOT / "pyproject.toml").read_text().partition(f'"{plugin.GROUP}"]\n')[2]
    name, _, value = entry.partition("\n")[0].replace('"', "").partition(" = ")
    info = tmp_path / "qkern-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qkern\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugin.GROUP}]\n{name} = {value}\n")
    path = os.pathsep.join([str(Path(qkern.__file__).parents[1]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "PYTHONPATH": path, plugin.VARIABLE: ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["False False False", "True", "True"], done.stderr
    assert "qkern" not in done.stderr


def test_bitsandbytes_imports_beside_a_broken_qkern(
    own: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "qkern.integrations.bitsandbytes_kernels", None)
    plugin.register()
    assert not plugin.is_enabled()
    assert "qkern's plug-in is off: the bitsandbytes plug-in needs" in caplog.text


def test_a_setting_that_is_not_known_is_said(
    own: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "yes")
    plugin.register()
    assert not plugin.is_enabled()
    assert "QKERN_BITSANDBYTES is 'yes': allowed are 1 (on)" in caplog.text
    assert "allowed are" in plugin.status().why


def test_an_entry_that_no_one_finds_is_said(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.setenv(plugin.VARIABLE, "1")
    assert plugin.status() == (
        importlib.metadata.version("bitsandbytes"),
        False,
        "qkern runs from its source: bitsandbytes finds installed ones alone",
        plugin.OPERATORS,
    )


def test_without_operators_to_replace_it_says_which_version_has_them(
    own: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_exists", lambda torch, name: False)
    with pytest.raises(MissingDependencyError, match="install"):
        plugin.enable()
    assert not plugin.is_enabled()
