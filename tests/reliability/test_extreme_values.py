"""Extremes, ties, flushed subnormals, threads: the same bytes of every body."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bodies import BODIES, decode_on, decoded_scales, encode_on, same_bits
from cases import ties
from format_cases import FLOATS, QUANT_TYPES
from torch import Tensor

import qkern
from qkern import codec, reference
from qkern.formats import FP4, NF4, QuantFormat


def all_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype, subnormals and both zeros too."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


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
