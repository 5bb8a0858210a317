"""The bitsandbytes plug-in: its operators on a CPU, beside bitsandbytes' own and decoded values."""

from __future__ import annotations

import itertools

import pytest
import torch
from plugin_weights import (
    DTYPES,
    NEAR,
    assert_same,
    bnb,
    bnbf,
    decoded,
    quantized,
    relative,
    scaled,
)
from torch import Tensor

from qkern.errors import DTypeError, FormatError, ShapeError
from qkern.integrations import bitsandbytes as plugin

# bitsandbytes 0.50 decodes the first four with the scales of other blocks where it has AVX-512;
# then odd sizes, one dimension, three, and none.
SHAPES = [(64, 96), (300, 400), (3, 4304), (64, 64), (7, 33), (7,), (8,), (3, 5, 7), (0, 8), ()]


def tensors_of(packed: Tensor, state: bnbf.QuantState) -> dict[str, Tensor]:
    """All that is written."""
    return {"packed": packed} | state.as_dict(packed=True)


def test_dequantize_is_exact_for_every_shape(with_plugin: None) -> None:
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


def test_the_same_bytes_are_written_with_and_without(without_plugin: None) -> None:
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


def test_products_are_those_of_the_decoded_weight(with_plugin: None) -> None:
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


def test_codes_stored_in_another_dtype_multiply_the_same(with_plugin: None) -> None:
    W, x = scaled(64, 96), scaled(3, 96, seed=1)
    results = [
        bnb.matmul_4bit(x, *quantized(W, quant_storage=storage))
        for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    ]
    assert all(torch.equal(results[0], result) for result in results)


def test_scales_in_a_code_of_ones_own_are_decoded_by_it(with_plugin: None) -> None:
    W, x = scaled(64, 512), scaled(3, 512, seed=1)
    packed, state = quantized(W, compress_statistics=True)
    state.state2.code = state.state2.code * 0.5
    y = bnb.matmul_4bit(x, packed, state)
    assert relative(y, x.double() @ decoded(packed, state, W.dtype).double().t()) < 1e-6


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gemv_reads_both_layouts(with_plugin: None, quant_type: str) -> None:
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


def test_results_go_into_out(with_plugin: None) -> None:
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


def test_int8_rows_are_those_of_bitsandbytes(without_plugin: None) -> None:
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


def test_a_batch_of_int8_rows(with_plugin: None) -> None:
    A = scaled(3, 4, 8)
    codes, absmax, columns = bnbf.int8_vectorwise_quant(A, 4.0)
    flat = bnbf.int8_vectorwise_quant(A.reshape(12, 8), 4.0)
    assert columns.numel()
    for one, other in zip((codes.reshape(12, 8), absmax, columns), flat, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_linear8bit_is_the_same(without_plugin: None, threshold: float) -> None:
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


def test_what_does_not_fit_is_refused(with_plugin: None) -> None:
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


def test_operators_keep_their_contract_with_torch(with_plugin: None) -> None:
    W, x = scaled(64, 96), scaled(3, 96, seed=1)
    packed, state = quantized(W)
    ops, weight = torch.ops.bitsandbytes, (state.absmax, 64, "nf4")
    check = torch.library.opcheck
    check(ops.quantize_4bit.default, (W, 64, "nf4", torch.uint8))
    check(ops.dequantize_4bit.default, (packed, *weight, [64, 96], torch.float32))
    check(ops.gemm_4bit.default, (x, packed, [64, 96], *weight))
    check(ops.gemv_4bit.default, (x, packed, [64, 96], state.absmax, state.code, 64))
    check(ops.int8_vectorwise_quant.default, (W,))
