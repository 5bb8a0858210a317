"""Any values: exact where bytes are promised, bounded where they are not, never silently lost."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bodies import BODIES, decode_on, encode_on, same_bits
from cases import ties
from format_cases import QUANT_TYPES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qkern
from qkern import codec, reference
from qkern.formats import FP4, NF4, QuantFormat

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def all_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype, subnormals and both zeros too."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def decoded_scales(q: qkern.QuantizedTensor) -> Tensor:
    """The fp32 scales that decoding multiplies by."""
    if q.nested_absmax is None:
        return q.absmax.reshape(-1)
    return reference.dequantize_absmax(q.absmax.reshape(-1), q.nested_absmax, q.offset)


# -- NaN and infinity ------------------------------------------------------------------------


@pytest.mark.case("B1", "B2")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("quant_type", "method"),
    [
        *((quant_type, "absmax") for quant_type in (*QUANT_TYPES, "int8_row")),
        ("nf4", "search"),
        ("fp4", "search"),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_value_that_is_not_finite_stays_in_its_block(
    bad: float, quant_type: str, method: str, double_quant: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    block = 300 if quant_type == "int8_row" else 64
    for dtype in FLOATS:
        values = torch.randn(64, 300, generator=generator).to(dtype)
        settings = {"quant_type": quant_type, "double_quant": double_quant, "method": method}
        at = int(torch.randint(values.numel(), (), generator=generator))
        clean = qkern.quantize(values, **{**settings, "double_quant": False}).dequantize()
        values.reshape(-1)[at] = bad
        with pytest.raises(qkern.NonFiniteError, match=rf"in 1 of the values.*index {at}:"):
            qkern.quantize(values, **settings)
        q = qkern.quantize(values, **settings, nonfinite="keep")
        assert not q.format.double_quant  # 8 bits have no code for such a scale
        dense = q.dequantize().reshape(-1)
        others = torch.arange(values.numel()) // block != at // block
        assert same_bits(dense[others], clean.reshape(-1)[others])
        assert not dense[at].isfinite()
        if dtype == torch.float32:
            array = qkern.quantize(values.numpy(), **settings, nonfinite="keep")
            assert same_bits(torch.from_numpy(qkern.dequantize(array)).reshape(-1), dense)


@pytest.mark.case("B1", "B2")
def test_the_layer_is_named_and_may_be_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[2, 3], model[1].weight[5, 0] = float("nan"), float("inf")
    with pytest.raises(qkern.NonFiniteError, match=r"1\.weight: .*in 2 of .*index 131"):
        qkern.quantize_model(model)
    qkern.quantize_model(model, nonfinite="keep")
    assert model[1].weight.dequantize()[6:].isfinite().all()


# -- zeros, scales in 8 bits -----------------------------------------------------------------


@pytest.mark.case("B3")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_are_exact_and_their_scale_is_0(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    some = torch.randn(8, 64).to(dtype)
    some[3] = 0
    for values in (torch.zeros(8, 64, dtype=dtype), torch.zeros(70, dtype=dtype), some):
        q = qkern.quantize(values, quant_type, double_quant=double_quant)
        empty = (values == 0).reshape(-1)
        dense = q.dequantize().reshape(-1)
        assert same_bits(dense[empty], torch.zeros_like(dense[empty]))
        plain = qkern.quantize(values, quant_type, double_quant=False)
        # a ragged last block has bitsandbytes' floor instead, 1e-38
        assert plain.absmax.reshape(-1)[int(empty.nonzero()[0]) // 64] == 0
        for body in BODIES:
            packed, absmax = encode_on(body, values, plain.format)
            assert same_bits(packed, plain.packed)
            assert same_bits(absmax, plain.absmax)


@pytest.mark.case("B4", "B6")
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 24),
    spread=st.floats(0, 6),
    outlier=st.sampled_from((0.0, 10.0, 1e4, 1e30)),
    quant_type=st.sampled_from(QUANT_TYPES),
    method=st.sampled_from(("absmax", "search")),
    seed=st.integers(0, 999),
)
def test_scales_in_8_bits_keep_their_sign_and_size(
    rows: int,
    blocks: int,
    spread: float,
    outlier: float,
    quant_type: str,
    method: str,
    seed: int,
) -> None:
    """Rows up to 10^6 apart and one huge value: the scales stay right, in 8 bits or in 32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 64 * blocks, generator=generator)
    values *= 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    if outlier:
        values[0, 0] = outlier
    method = "absmax" if quant_type == "int8" else method
    q = qkern.quantize(values, quant_type, method=method)
    exact = qkern.quantize(values, quant_type, method=method, double_quant=False)
    scales, expected = decoded_scales(q), exact.absmax.reshape(-1)
    assert (scales.sign() == expected.sign()).all()  # a searched scale may be negative
    assert method == "search" or (scales >= 0).all()
    assert ((scales - expected).abs() <= expected.abs() / 8).all()
    dense = q.dequantize()
    assert (dense.sign() * values.sign() >= 0).all()
    # 1/8 off at most, on top of what fp32 scales give
    bound = exact.dequantize().sub(values).norm(dim=1) + dense.norm(dim=1) / 7
    assert (dense.sub(values).norm(dim=1) <= bound).all()


@pytest.mark.case("B4", "B6")
def test_rows_1000_apart_are_as_good_as_with_fp32_scales_and_reported() -> None:
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight[::2] *= 1e-3
    dense = layer.weight.detach().clone()
    report = qkern.quantize_model(model := nn.Sequential(layer))
    assert "fp32 scales" in report.rows[0].reason
    error = (model[0].weight.dequantize() - dense).norm(dim=1) / dense.norm(dim=1)
    assert error.max() < 0.12


@pytest.mark.case("B5")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1.0, 0.1, 3e-5, 3e38])
def test_scales_that_are_all_equal_are_exact(groups: int, size: float) -> None:
    values = torch.full((groups * 256, 64), size)
    for quant_type in QUANT_TYPES:
        q = qkern.quantize(values, quant_type)
        assert q.format.double_quant
        assert same_bits(decoded_scales(q), values[:, 0].contiguous())
        assert same_bits(q.dequantize(), qkern.quantize(values, q.format).dequantize())


@pytest.mark.case("B5")
def test_groups_of_equal_scales_that_differ_from_each_other_stay_near() -> None:
    values = torch.ones(512, 64)
    values[256:] = 0.5
    q = qkern.quantize(values, double_quant=True)
    # the table has +1 but no -1: the nearest is -0.99297, of a distance of 0.25 to the mean
    assert (decoded_scales(q) - values[:, 0]).abs().max() < 0.01 * 0.25
    assert same_bits(decoded_scales(q)[:256], values[:256, 0].contiguous())


# -- extremes --------------------------------------------------------------------------------


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Subnormals are zeros to the processor, as other libraries ask for."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert torch.tensor(1e-40) * 1 == 0
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.case("B7")
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_flushing_subnormals_changes_no_byte_of_a_body(body: str, quant_type: str) -> None:
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    for dtype in FLOATS:
        for size in (1e-45, 1e-42, 1e-39, 1.2e-38, 1e-30, 6e-8, 1e-5):
            values = (torch.randn(70, 65).double() * size).to(dtype)
            expected = encode_on(body, values, fmt, threads=2)
            dense = [decode_on(body, *expected, fmt, values.numel(), to) for to in FLOATS]
            with flushing():
                got = encode_on(body, values, fmt, threads=2)
                again = [decode_on(body, *got, fmt, values.numel(), to) for to in FLOATS]
            assert all(map(same_bits, got, expected))
            assert all(map(same_bits, again, dense))


@pytest.mark.case("B7")
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_flushing_subnormals_changes_no_byte_of_the_front_doors(
    quant_type: str, double_quant: bool
) -> None:
    def run(values: Tensor) -> list[Tensor]:
        q = qkern.quantize(values, quant_type, double_quant=double_quant)
        parts = [p for p in q.parts if p is not None]
        return [*parts, *(q.dequantize(dtype) for dtype in FLOATS)]

    def run_array(values: np.ndarray) -> list[bytes]:
        q = qkern.quantize(values, quant_type, double_quant=double_quant)
        dense = [qkern.dequantize(q, name) for name in ("float32", "float16")]
        arrays = (q.packed, q.absmax, q.nested_absmax, q.offset, *dense)
        return [a.tobytes() for a in arrays if a is not None]

    for size in (1e-42, 1e-39, 1.2e-38, 6e-8):  # the mean of the scales is subnormal at first
        for dtype in FLOATS:
            values = (torch.randn(300, 64).double() * size).to(dtype)
            expected = run(values)
            with flushing():
                got = run(values)
            assert all(map(same_bits, got, expected))
        array = (np.random.default_rng(0).standard_normal((300, 64)) * size).astype(np.float32)
        expected_array = run_array(array)
        with flushing():
            assert run_array(array) == expected_array


@pytest.mark.case("B7")
def test_flushing_subnormals_changes_no_scale_in_8_bits() -> None:
    absmax = (np.random.default_rng(0).random(600) * 1e-39).astype(np.float32)
    expected = codec.encode_absmax(absmax)
    with flushing():
        got = codec.encode_absmax(absmax)
    assert [np.asarray(a).tobytes() for a in got] == [np.asarray(a).tobytes() for a in expected]


@pytest.mark.case("B8")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_values_up_to_the_largest_of_their_dtype(
    dtype: torch.dtype, quant_type: str, double_quant: bool
) -> None:
    top = torch.finfo(dtype).max
    steps = torch.tensor([1.0, 0.9999, 0.75, 0.5, 1e-3]).double() * top
    values = (torch.randn(5, 40, 64).double().clamp(-1, 1) * steps[:, None, None]).to(dtype)
    values[:, :, 0] = steps[:, None].to(dtype)
    values[:, :, 1] = -steps[:, None].to(dtype)
    values[0, 0] = top
    for block in (values[0], values[3], values):
        q = qkern.quantize(block, quant_type, double_quant=double_quant)
        assert decoded_scales(q).isfinite().all()
        assert q.dequantize().isfinite().all()
        exact = reference.quantize(block, q.format)
        assert same_bits(q.absmax.reshape(-1), exact.absmax)
    for body in BODIES:
        fmt = QuantFormat(quant_type, 64, double_quant=False)
        packed, absmax = encode_on(body, values, fmt)
        assert decode_on(body, packed, absmax, fmt, values.numel(), dtype).isfinite().all()


@pytest.mark.case("B9")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_16_bit_value_in_a_block(dtype: torch.dtype, quant_type: str) -> None:
    values = all_values(dtype)
    alone = torch.zeros(len(values), 32, dtype=dtype)
    alone[:, 0] = values  # each one is the largest of its block
    small = values[values.abs() <= 1]
    small = small[: len(small) // 31 * 31].reshape(-1, 31)
    beside = torch.cat([torch.ones(len(small), 1, dtype=dtype), small], 1)  # each beside a 1
    fmt = QuantFormat(quant_type, 32, double_quant=False)
    for block in (alone, beside):
        expected = reference.quantize(block, fmt)
        dense = reference.dequantize(expected, fmt, block.numel(), dtype)
        for body in BODIES:
            packed, absmax = encode_on(body, block, fmt)
            assert torch.equal(packed, expected.packed)
            assert same_bits(absmax, expected.absmax)
            assert same_bits(decode_on(body, packed, absmax, fmt, block.numel(), dtype), dense)


@pytest.mark.case("B9")
@pytest.mark.parametrize(("quant_type", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_a_tie_takes_the_lower_code_on_every_body(
    quant_type: str, table: tuple[float, ...]
) -> None:
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    values = torch.from_numpy(ties(table, 64 * 47))
    values[::64] = 1  # so that each block is scaled by exactly 1
    expected = reference.quantize(values, fmt)
    ascending = sorted(set(table))
    decoded = reference.dequantize(expected, fmt, values.numel(), torch.float32)
    for low, high in itertools.pairwise(ascending):
        middle = (torch.tensor(low) + torch.tensor(high)) / 2
        assert (decoded[values == middle] == low).all()
    for body in BODIES:
        packed, absmax = encode_on(body, values, fmt)
        assert torch.equal(packed, expected.packed)
        assert same_bits(absmax, expected.absmax)


@pytest.mark.case("B9")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_negative_zero_is_zero(quant_type: str) -> None:
    values = torch.randn(64)
    values[::3] = -0.0
    dense = qkern.quantize(values, quant_type).dequantize()
    positive = values.clone()
    positive[::3] = 0.0
    assert same_bits(dense, qkern.quantize(positive, quant_type).dequantize())
    assert (dense[::3] == 0).all()


@pytest.mark.case("B11")
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_threads_change_no_byte(body: str, quant_type: str) -> None:
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    values = torch.randn((1 << 20) + 7)
    expected = encode_on(body, values, fmt, threads=1)
    dense = decode_on(body, *expected, fmt, values.numel(), torch.bfloat16, threads=1)
    for threads in (2, 7):
        got = encode_on(body, values, fmt, threads=threads)
        assert all(map(same_bits, got, expected))
        again = decode_on(body, *got, fmt, values.numel(), torch.bfloat16, threads=threads)
        assert same_bits(again, dense)


@pytest.mark.case("B11")
def test_threads_of_torch_change_no_byte() -> None:
    values = torch.randn(2000, 640)
    expected = qkern.quantize(values)
    try:
        for threads in (2, 7):
            torch.set_num_threads(threads)
            q = qkern.quantize(values)
            assert all(map(same_bits, q.parts, expected.parts))
            assert same_bits(q.dequantize(), expected.dequantize())
    finally:
        torch.set_num_threads(1)


@pytest.mark.case("B14")
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_is_symmetric_and_never_overflows(dtype: torch.dtype) -> None:
    values = torch.zeros(300, 64, dtype=dtype)
    values[1:256] = torch.arange(-127, 128)[:, None].to(dtype)  # every code, as its own absmax
    values[256] = torch.arange(-128, 128)[::4].to(dtype)  # absmax at -128
    values[257:] = torch.randn(43, 64).to(dtype)
    values[257:, 5] = -values[257:].abs().amax(1)
    fmt = QuantFormat("int8", 64, double_quant=False)
    for body in BODIES:
        packed, absmax = encode_on(body, values, fmt)
        codes = packed.reshape(values.shape)
        assert codes.min() == -127
        assert codes.max() == 127
        assert (codes[0] == 0).all()
        assert absmax[0] == 0
        assert codes[256, 0] == -127
        assert (codes[257:, 5] == -127).all()
        dense = decode_on(body, packed, absmax, fmt, values.numel(), dtype).reshape(values.shape)
        assert torch.equal(dense[0], values[0])
        step = absmax[:, None] / 127
        assert ((dense.float() - values.float()).abs() <= step * 0.51 + values.abs() * 0.005).all()
    exact = torch.arange(-127, 128, dtype=torch.float32)
    assert torch.equal(qkern.quantize(exact, "int8", blocksize=256).dequantize(), exact)
