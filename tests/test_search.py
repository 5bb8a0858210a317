"""``method="search"``: less error in the same bytes, on every door and device path."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from cases import value_patterns
from checkpoints import row, write
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import tiny_llama

import qkern
from qkern import _native, codec, reference
from qkern.formats import BLOCKSIZES, QuantFormat

BODIES = _native.available_simd()


def block_errors(q: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error of each block, fp64."""
    squares = (q.dequantize(torch.float32).double() - values.double()).square()
    squares = squares if weights is None else squares * weights.double()
    padded = nn.functional.pad(squares.reshape(-1), (0, -values.numel() % q.format.blocksize))
    return padded.reshape(-1, q.format.blocksize).sum(1)


def relative(q: Tensor, values: Tensor) -> float:
    return float((q.dequantize().double() - values.double()).norm() / values.double().norm())


@pytest.mark.parametrize("double_quant", [False, True])
def test_gaussian_weights_lose_a_tenth_of_the_error(double_quant: bool) -> None:
    w = torch.randn(512, 512)
    absmax = qkern.quantize(w, double_quant=double_quant)
    searched = qkern.quantize(w, double_quant=double_quant, method="search")
    assert searched.format == absmax.format
    assert searched.nbytes == absmax.nbytes
    assert relative(absmax, w) > 0.0915
    assert relative(searched, w) < 0.0832


@given(
    shape=st.sampled_from([(64,), (1,), (7, 33), (65, 172), (3, 16, 96), (0, 4), ()]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    blocksize=st.sampled_from(BLOCKSIZES),
    seed=st.integers(0, 99),
)
def test_with_fp32_scales_no_block_is_worse_than_by_absmax(
    shape: tuple[int, ...], quant_type: str, dtype: torch.dtype, blocksize: int, seed: int
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    settings = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": False}
    absmax = qkern.quantize(values, **settings)
    searched = qkern.quantize(values, **settings, method="search")
    assert (block_errors(searched, values) <= block_errors(absmax, values)).all()


@functools.cache
def searched(quant_type: str, blocksize: int) -> dict[str, tuple[Tensor, reference.Parts]]:
    """Each pattern of values, with the codes and scales that the reference finds."""
    fmt, found = QuantFormat(quant_type, blocksize, double_quant=False), {}
    for name, values in value_patterns(4099, np.random.default_rng(0)):
        x = torch.from_numpy(values)
        scales = reference.search_scales(x, fmt)
        found[name] = x, reference.Parts(reference.encode(x, scales, fmt), scales, None, None)
    return found


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_body_finds_no_more_error_than_the_reference(body: str, quant_type: str) -> None:
    for blocksize in (32, 64, 256):
        fmt = QuantFormat(quant_type, blocksize, double_quant=False)
        for name, (x, theirs) in searched(quant_type, blocksize).items():
            values = x.numpy()
            scales = np.empty(fmt.num_blocks(values.size), np.float32)
            packed = np.empty(fmt.packed_size(values.size), np.uint8)
            code = codec.code_array(quant_type)
            _native.search_scales(values, "float32", code, blocksize, scales, simd=body)
            _native.encode_4bit(values, "float32", code, blocksize, scales, packed, simd=body)
            ours = reference.Parts(torch.from_numpy(packed), torch.from_numpy(scales), None, None)
            errors = [
                float((reference.dequantize(p, fmt, x.numel(), x.dtype).double() - x).norm())
                for p in (ours, theirs)
            ]
            # Rounding decides between trials that are equally good: not the same scales.
            assert errors[0] <= errors[1] * 1.005 + 1e-45, f"{body} {name} {blocksize}"
            recoded = reference.encode(x, torch.from_numpy(scales), fmt)
            assert torch.equal(recoded, ours.packed), f"{body} {name} {blocksize}"


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_body_finds_the_scales_of_the_reference(body: str, quant_type: str) -> None:
    for blocksize in BLOCKSIZES:
        fmt = QuantFormat(quant_type, blocksize, double_quant=False)
        values = torch.randn(40 * blocksize + 172)
        scales = np.empty(fmt.num_blocks(values.numel()), np.float32)
        code = codec.code_array(quant_type)
        _native.search_scales(values.numpy(), "float32", code, blocksize, scales, simd=body)
        expected = reference.search_scales(values, fmt)
        torch.testing.assert_close(torch.from_numpy(scales), expected, rtol=1e-5, atol=0)


def test_codes_are_chosen_against_the_scales_as_they_are_decoded() -> None:
    w = torch.randn(128, 128)
    q = qkern.quantize(w, method="search")
    scales = reference.dequantize_absmax(q.absmax.reshape(-1), q.nested_absmax, q.offset)
    assert (scales < 0).any()
    assert torch.equal(q.packed.reshape(-1), reference.encode(w, scales, q.format))


def test_numpy_and_torch_doors_give_the_same_bytes() -> None:
    w, importance = torch.randn(33, 172), torch.rand(172)
    for double_quant in (False, True):
        for weights in (None, importance):
            settings = {"double_quant": double_quant, "method": "search"}
            tensor = qkern.quantize(w, importance=weights, **settings)
            array = qkern.quantize(
                w.numpy(), importance=None if weights is None else weights.numpy(), **settings
            )
            assert array.packed.tobytes() == tensor.packed.numpy().tobytes()
            assert array.absmax.tobytes() == tensor.absmax.numpy().tobytes()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_same_values(quant_type: str, double_quant: bool) -> None:
    w = torch.randn(256, 256)
    q = qkern.quantize(w, quant_type, double_quant=double_quant, method="search")
    code = torch.tensor(q.format.code)
    nested = None
    if double_quant:
        table = torch.from_numpy(codec.nested_code_array())
        nested = bnb.QuantState(q.nested_absmax, code=table, blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        q.absmax.reshape(-1),
        w.shape,
        code,
        64,
        quant_type,
        torch.float32,
        None if q.offset is None else q.offset[0],
        nested,
    )
    theirs = bnb.dequantize_4bit(q.packed.reshape(-1, 1), state)
    assert torch.equal(theirs, q.dequantize())


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    w, importance = torch.randn(100, 96), torch.rand(96) ** 4
    plain = qkern.quantize(w, method="search", double_quant=False)
    weighted = qkern.quantize(w, method="search", importance=importance, double_quant=False)
    assert block_errors(weighted, w, importance).sum() < block_errors(plain, w, importance).sum()
    absmax = qkern.quantize(w, double_quant=False)
    errors = [block_errors(q, w, importance) for q in (weighted, absmax)]
    assert (errors[0] <= errors[1]).all()


def test_layers_and_models_take_the_method() -> None:
    dense = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    weights, x = (
        [dense[0].weight.detach().clone(), dense[2].weight.detach().clone()],
        torch.rand(128),
    )
    linear = nn.Linear(128, 64)
    expected = qkern.quantize(linear.weight.detach(), method="search")
    lora = qkern.QLoRALinear.from_linear(linear, method="search", r=4)
    assert torch.equal(lora.weight.packed, expected.packed)
    qkern.quantize_model(dense, method="search", importance={"0": x}, double_quant=False)
    for weight, index in zip(weights, (0, 2), strict=True):
        importance = x if index == 0 else None
        expected = qkern.quantize(
            weight, method="search", importance=importance, double_quant=False
        )
        assert torch.equal(dense[index].weight.packed, expected.packed)


def test_on_meta_there_are_shapes_only() -> None:
    q = qkern.quantize(torch.empty(8, 64, device="meta"), method="search")
    assert (q.shape, q.packed.shape) == ((8, 64), (8, 32))


def test_nan_stays_in_its_block() -> None:
    values = torch.randn(1024)
    clean = qkern.quantize(values, method="search", double_quant=False)
    values[200] = torch.nan
    with pytest.raises(qkern.NonFiniteError, match="index 200"):
        qkern.quantize(values, method="search")
    kept = qkern.quantize(values, method="search", double_quant=False, nonfinite="keep")
    hurt = torch.arange(1024) // 64 == 200 // 64
    assert torch.equal(kept.dequantize()[~hurt], clean.dequantize()[~hurt])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"quant_type": "int8", "method": "search"}, qkern.FormatError, "4-bit"),
        ({"importance": torch.ones(64)}, qkern.FormatError, "absmax"),
        ({"method": "search", "importance": torch.ones(63)}, qkern.ShapeError, r"\(64,\)"),
        ({"method": "search", "importance": torch.ones(2, 64)}, qkern.ShapeError, r"\(64,\)"),
        ({"method": "search", "importance": -torch.ones(64)}, qkern.FormatError, "column 0 is -1"),
        ({"method": "search", "importance": torch.full((64,), torch.inf)}, ValueError, "inf"),
    ],
)
def test_wrong_settings_are_typed_errors(
    settings: dict[str, object], error: type, text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        qkern.quantize(torch.randn(4, 64), **settings)
    assert isinstance(caught.value, qkern.QkernError)
    arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in settings.items()}
    with pytest.raises(error):
        qkern.quantize(np.ones((4, 64), np.float32), **arrays)


def test_importance_of_an_unknown_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(qkern.FormatError, match="'1'"):
        qkern.quantize_model(model, method="search", importance={"1": torch.ones(64)})


@pytest.mark.parametrize("double_quant", [True, False])
def test_signs_that_search_has_chosen_are_no_damage(double_quant: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():  # small scales of both signs: as 8 bits can just hold them, and cannot
        mlp.gate_proj.weight[::2] /= 45
        mlp.up_proj.weight *= torch.rand(192, 1) ** 4
    model.save_pretrained(tmp_path / "dense")
    qkern.quantize_model(model, method="search", double_quant=double_quant)
    qkern.save(model, tmp_path / "stored")
    report = qkern.inspect_checkpoint(tmp_path / "stored")
    found = [r for r in report.tensors if r.format is not None and r.scales is not None]
    assert all(r.scales.negative > 0 == r.scales.turned for r in found if r.scales)
    kept = ("model.layers.0.mlp.up_proj.weight", "fp32 scales, others have 8-bit ones")
    assert report.findings() == ([kept] if double_quant else [])
    assert {r.format.double_quant for r in found if r.format} == {double_quant, False}
    settings: dict[str, Any] = {"double_quant": double_quant, "method": "search"}
    trial = qkern.inspect_checkpoint(tmp_path / "dense", **settings)
    compared = qkern.inspect_checkpoint(tmp_path / "stored", compare=tmp_path / "dense")
    assert compared.quantized_relative_rms == trial.relative_rms
    assert trial.relative_rms == trial.quantized_relative_rms
    assert compared.relative_rms < trial.relative_rms  # type: ignore[operator]
    for r in found:
        assert r.scales == row(trial, r.name).scales
        assert row(compared, r.name).error == row(trial, r.name).error


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_trial_of_search_has_its_error(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    w = torch.randn(33, 172).bfloat16()
    settings: dict[str, Any] = {"double_quant": double_quant, "method": "search"}
    dense = qkern.quantize(w, quant_type, **settings).dequantize(torch.float32)
    path = write(tmp_path, {"w.weight": w})
    searched = qkern.inspect_checkpoint(path, quant_type, **settings)
    expected = (dense.double() - w.double()).norm() / w.double().norm()
    assert searched.relative_rms == pytest.approx(float(expected), rel=1e-12)
    plain = qkern.inspect_checkpoint(path, quant_type, double_quant=double_quant)
    assert searched.relative_rms < 0.95 * plain.relative_rms  # type: ignore[operator]
    assert searched.bits_per_weight == plain.bits_per_weight
