"""The NumPy door, and every SIMD body against the readable reference."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import as_bits, value_patterns
from hypothesis import given
from hypothesis import strategies as st

import qkern
from qkern import _native, codec, functional, reference
from qkern.formats import BLOCKSIZES, DTYPES, QUANT_TYPES, QuantFormat, resolve_format

BODIES = _native.available_simd()
RNG = np.random.default_rng(0)
THP = Path("/sys/kernel/mm/transparent_hugepage")


def reference_parts(bits: np.ndarray, dtype: str, fmt: QuantFormat) -> reference.Parts:
    if dtype == "float32":
        values = torch.from_numpy(bits.copy())
    else:
        values = torch.from_numpy(bits.view(np.int16).copy()).view(getattr(torch, dtype))
    return reference.quantize(values, fmt)


# Rows of one value, odd, of no whole strips, of more values than there are.
ROWS = [("int8_row", row) for row in (1, 33, 172, 4096, 5000)]


@pytest.mark.parametrize(
    ("quant_type", "blocksize"),
    [(name, size) for name in ("nf4", "fp4", "int8") for size in (32, 64, 256, 4096)] + ROWS,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_body_writes_and_reads_the_references_bytes(
    quant_type: str, dtype: str, blocksize: int
) -> None:
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    for n in (1, 33, 64, 127, 1000, 4099):
        for name, values in value_patterns(n, np.random.default_rng(n)):
            bits = as_bits(values, dtype)
            expected = reference_parts(bits, dtype, fmt)
            dense = reference.dequantize(expected, fmt, n, getattr(torch, dtype))
            back = dense.numpy() if dtype == "float32" else dense.view(torch.int16).numpy()
            for body in BODIES:
                where = f"{body} {name}[{n}]"
                packed, absmax = run_quantize(bits, dtype, fmt, body)
                assert_equal(packed, expected.packed.numpy(), where)
                assert_equal(absmax, expected.absmax.numpy(), where)
                out = run_dequantize(packed, absmax, fmt, n, dtype, body)
                assert_equal(out.view(back.dtype), back, where)


def assert_equal(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    """As NumPy's own does, which takes longer than what is compared: here where they differ."""
    if not np.array_equal(found, expected, equal_nan=True):
        np.testing.assert_array_equal(found, expected, err_msg=where)


def run_quantize(
    bits: np.ndarray, dtype: str, fmt: QuantFormat, body: str, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    absmax = np.full(fmt.num_blocks(bits.size), np.nan, np.float32)
    settings = {"simd": body, "threads": threads}
    if fmt.code is None:
        packed: np.ndarray = np.full(bits.size, -128, np.int8)
        quantize = _native.quantize_int8_rows if fmt.kind.per_row else _native.quantize_int8
        quantize(bits, dtype, fmt.blocksize, packed, absmax, **settings)
    else:
        packed = np.full(fmt.packed_size(bits.size), 0xAB, np.uint8)
        code = codec.code_array(fmt.quant_type)
        _native.quantize_4bit(bits, dtype, code, fmt.blocksize, packed, absmax, **settings)
    return packed, absmax


def run_dequantize(
    packed: np.ndarray, absmax: np.ndarray, fmt: QuantFormat, n: int, dtype: str, body: str
) -> np.ndarray:
    out = np.full(n, np.nan, np.float32) if dtype == "float32" else np.full(n, 0x7FFF, np.uint16)
    if fmt.code is None:
        _native.dequantize_int8(packed, absmax, fmt.blocksize, out, dtype, simd=body)
    else:
        code = codec.code_array(fmt.quant_type)
        _native.dequantize_4bit(packed, absmax, code, fmt.blocksize, out, dtype, simd=body)
    return out


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_thread_count_does_not_change_bytes(body: str, quant_type: str) -> None:
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    values = RNG.standard_normal(1 << 20).astype(np.float32)
    expected = run_quantize(values, "float32", fmt, body, threads=1)
    for threads in (2, 7):
        got = run_quantize(values, "float32", fmt, body, threads=threads)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    quant_type=st.sampled_from(QUANT_TYPES),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_strides_round_trip_within_the_formats_error(
    shape: list[int],
    quant_type: str,
    dtype: str,
    blocksize: int,
    double_quant: bool,
    transposed: bool,
    seed: int,
) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    values = values.T if transposed else values
    q = qkern.quantize(values, quant_type, blocksize=blocksize, double_quant=double_quant)
    back = qkern.dequantize(q)
    assert (back.shape, back.dtype, q.shape) == (values.shape, values.dtype, values.shape)
    contiguous = qkern.quantize(
        np.ascontiguousarray(values), quant_type, blocksize=blocksize, double_quant=double_quant
    )
    assert q.packed.tobytes() == contiguous.packed.tobytes()
    if values.size:
        # half the widest gap between codes, plus 1/8 for a scale in 8 bits
        gap = {"nf4": 0.152, "fp4": 0.167, "int8": 0.004, "int8_row": 0.004}[quant_type]
        worst = np.abs(values.astype(np.float32)).max() * (gap + 0.125 * q.format.double_quant)
        assert np.abs(back.astype(np.float32) - values.astype(np.float32)).max() <= worst + 1e-3


def test_bfloat16_comes_as_ml_dtypes_or_as_bits() -> None:
    values = RNG.standard_normal((8, 64)).astype(ml_dtypes.bfloat16)
    typed = qkern.quantize(values)
    bits = qkern.quantize(values.view(np.uint16), dtype="bfloat16")
    assert typed.packed.tobytes() == bits.packed.tobytes()
    assert qkern.dequantize(bits).dtype == ml_dtypes.bfloat16


def test_out_is_written_and_read_only_input_is_taken() -> None:
    values = RNG.standard_normal((8, 64)).astype(np.float32)
    values.flags.writeable = False
    q = qkern.quantize(values)
    out = np.full((8, 64), np.nan, np.float16)
    assert qkern.dequantize(q, "float16", out=out) is out
    np.testing.assert_array_equal(out, qkern.dequantize(q, "float16"))


def test_torch_and_numpy_doors_give_the_same_bytes() -> None:
    values = RNG.standard_normal((33, 172)).astype(np.float32)
    array, tensor = qkern.quantize(values), qkern.quantize(torch.from_numpy(values))
    for a, t in ((array.packed, tensor.packed), (array.absmax, tensor.absmax)):
        assert a.tobytes() == t.numpy().tobytes()
    assert torch.equal(functional.from_array(array).dequantize(), tensor.dequantize())
    np.testing.assert_array_equal(qkern.dequantize(array), tensor.dequantize().numpy())


def test_scales_that_8_bits_cannot_hold_stay_fp32() -> None:
    """Rows 1000 times apart: bitsandbytes' double quantization flips signs of the small ones."""
    values = RNG.standard_normal((64, 256)).astype(np.float32)
    values[::2] *= 1e-3
    q = qkern.quantize(values)
    assert not q.format.double_quant
    error = np.linalg.norm(qkern.dequantize(q) - values, axis=1) / np.linalg.norm(values, axis=1)
    assert error.max() < 0.15


def test_nonfinite_is_refused_with_its_place_or_kept_in_its_block() -> None:
    values = RNG.standard_normal(1024).astype(np.float32)
    clean = qkern.quantize(values, double_quant=False)
    values[200], values[700] = np.nan, np.inf
    with pytest.raises(qkern.NonFiniteError, match=r"2 of .*index 200"):
        qkern.quantize(values)
    kept = qkern.quantize(values, double_quant=False, nonfinite="keep")
    back, expected = qkern.dequantize(kept), qkern.dequantize(clean)
    hurt = np.zeros(1024, bool)
    hurt[192:256] = hurt[640:704] = True
    np.testing.assert_array_equal(back[~hurt], expected[~hurt])
    assert not np.isfinite(back[200])
    assert not np.isfinite(back[700])


def test_nonfinite_in_int8_rows_stays_in_its_row() -> None:
    values = RNG.standard_normal((5, 33)).astype(np.float32)
    expected = qkern.dequantize(qkern.quantize(values, "int8_row"))
    values[1, 32], values[3, 0] = np.nan, np.inf
    kept = qkern.quantize(values, "int8_row", nonfinite="keep")
    assert not kept.packed.reshape(5, 33)[[1, 3]].any()
    np.testing.assert_array_equal(np.isfinite(kept.absmax), [True, False, True, False, True])
    back = qkern.dequantize(kept)
    np.testing.assert_array_equal(back[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize(
    ("shape", "row", "rows"),
    [((3, 5, 7), 7, 15), ((4, 1), 1, 4), ((9,), 9, 1), ((), 1, 1), ((0, 6), 6, 0), ((6, 0), 1, 0)],
)
def test_an_int8_row_is_the_last_dimension(shape: tuple[int, ...], row: int, rows: int) -> None:
    """Fewer than 2 dimensions are one row; rows without values have no scales."""
    values = RNG.standard_normal(shape).astype(np.float32)
    for fmt in ("int8_row", QuantFormat("int8_row"), QuantFormat("int8_row", 1000)):
        q = qkern.quantize(values, fmt, blocksize=32, double_quant=True)
        assert q.format == QuantFormat("int8_row", row, double_quant=False)
        assert q.format.template == resolve_format("int8_row") == QuantFormat("int8_row", 0)
        assert q.nbytes == q.format.nbytes(values.size) == values.size + 4 * rows
        expected = np.abs(values).max(-1) if rows and values.ndim else np.abs(values)
        np.testing.assert_array_equal(q.absmax, expected.reshape(-1)[:rows])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: qkern.quantize(np.ones(4, np.float64)), qkern.DTypeError, "float64.*float32"),
        (lambda: qkern.quantize(np.ones(4, np.int8)), TypeError, "int8"),
        (lambda: qkern.quantize(np.ones(4, np.float32), "nf5"), qkern.FormatError, "nf4, fp4"),
        (lambda: qkern.quantize(np.ones(4, np.float32), blocksize=0), ValueError, "32, 64"),
        (lambda: qkern.quantize(np.ones(4, np.float32), blocksize=-64), ValueError, "32, 64"),
        (lambda: qkern.quantize(np.ones(4, np.float32), blocksize=True), ValueError, "32, 64"),
        (lambda: QuantFormat("int8_row", -1), qkern.FormatError, "a row's length"),
        (lambda: QuantFormat("int8_row", True), qkern.FormatError, "a row's length"),
        (lambda: resolve_format("int8_row").nbytes(9), qkern.FormatError, "for_shape"),
        (lambda: qkern.quantize(np.ones(4, np.float32), method="best"), ValueError, "absmax"),
        (
            lambda: qkern.dequantize(
                qkern.quantize(np.ones(4, np.float32)), out=np.ones(5, np.float32)
            ),
            qkern.ShapeError,
            r"\(4,\)",
        ),
        (
            lambda: qkern.dequantize(qkern.quantize(np.ones(4, np.float32)), "int8"),
            qkern.DTypeError,
            "bfloat16",
        ),
    ],
)
def test_wrong_input_is_a_typed_error(call: object, error: type, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, qkern.QkernError)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("offset", [0, 1, 5, 8, 31])
def test_reused_memory_gets_the_bytes_of_fresh_memory(dtype: str, body: str, offset: int) -> None:
    """Outputs of more than the 2 MiB from which they are written past the caches."""
    n = (1 << 20) + 12_345  # ragged
    bits = as_bits(RNG.standard_normal(n).astype(np.float32), dtype)
    for fmt in (QuantFormat("nf4", 64, double_quant=False), QuantFormat("int8", 64, False)):
        packed, absmax = run_quantize(bits, dtype, fmt, body)
        code = () if fmt.code is None else (codec.code_array(fmt.quant_type),)
        call = _native.dequantize_int8 if fmt.code is None else _native.dequantize_4bit
        fresh, room = np.zeros_like(bits), np.full(n + 64, 7, bits.dtype)
        call(packed, absmax, *code, 64, fresh, dtype, simd=body)
        call(packed, absmax, *code, 64, room[offset : offset + n], dtype, reused=True, simd=body)
        np.testing.assert_array_equal(room[offset : offset + n], fresh)
        assert (room[:offset] == 7).all()
        assert (room[offset + n :] == 7).all()


def test_huge_pages_are_advice_for_whole_ones_that_changes_no_byte() -> None:
    memory = np.full(9 << 20, 7, np.uint8)
    agreed = _native.advise_huge_pages(memory)
    assert agreed or not sys.platform.startswith("linux") or not THP.exists()
    assert (memory == 7).all()
    assert not _native.advise_huge_pages(memory[: 1 << 20]), "no whole page is in it"
    memory.flags.writeable = False
    with pytest.raises(qkern.errors.ShapeError, match="read-only"):
        _native.advise_huge_pages(memory)
