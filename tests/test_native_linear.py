"""The native linear layer, as bound: what it computes, and what it refuses."""

import numpy as np
import pytest

from qkern import _native
from qkern.errors import DTypeError, FormatError, ShapeError

CODE = np.linspace(-1, 1, 16, dtype=np.float32)
ROWS, COLS, RANK = 70, 128, 3


def weight(kind: str, rng: np.random.Generator) -> tuple[tuple[object, ...], np.ndarray]:
    """The arguments that describe a weight, and its values in fp32."""
    blocks = ROWS * COLS // 64
    absmax = rng.random(blocks, np.float32) + 0.5
    dense = np.empty(ROWS * COLS, np.float32)
    if kind == "int8":
        packed = rng.integers(-127, 128, ROWS * COLS, np.int8)
        _native.dequantize_int8(packed, absmax, 64, dense, "float32")
        return (packed, None, absmax, None, None, None, 64, ROWS, COLS), dense
    packed = rng.integers(0, 256, ROWS * COLS // 2, np.uint8)
    nested: tuple[object, ...] = (absmax, None, None, None)
    if kind == "nested":
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        codes, second = np.empty(blocks, np.uint8), np.empty(-(-blocks // 256), np.float32)
        offset = np.empty(1, np.float32)
        _native.quantize_absmax(absmax, table, codes, second, offset)
        _native.dequantize_absmax(codes, table, second, offset, absmax)
        nested = (codes, table, second, offset)
    _native.dequantize_4bit(packed, absmax, CODE, 64, dense, "float32")
    return (packed, CODE, *nested, 64, ROWS, COLS), dense


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Values rounded to a dtype (bfloat16 towards zero), flat as they are stored, and as floats."""
    if dtype == "float16":
        rounded = values.astype(np.float16)
        return rounded.ravel().view(np.uint16), rounded.astype(np.float32)
    if dtype == "bfloat16":
        upper = values.view(np.uint32) & 0xFFFF0000
        return (upper >> 16).astype(np.uint16).ravel(), upper.view(np.float32)
    return values.ravel(), values


@pytest.mark.parametrize("simd", _native.available_simd())
@pytest.mark.parametrize(
    ("kind", "tokens", "lora_dtype"),
    [("plain", 20, "float32"), ("nested", 3, "bfloat16"), ("int8", 9, "float16")],
)
def test_forward_and_gradients_are_those_of_the_dense_layer(
    kind: str, tokens: int, lora_dtype: str, simd: str
) -> None:
    rng = np.random.default_rng(1)
    parts, flat = weight(kind, rng)
    dense = flat.reshape(ROWS, COLS).astype(np.float64)
    x, dy = rng.random((tokens, COLS), np.float32), rng.random((tokens, ROWS), np.float32)
    flat_a, a = stored(rng.random((RANK, COLS), np.float32), lora_dtype)
    flat_b, b = stored(rng.random((ROWS, RANK), np.float32), lora_dtype)
    bias = rng.random(ROWS, np.float32)
    adapter = {"lora_a": flat_a, "lora_b": flat_b, "lora_dtype": lora_dtype, "scaling": 2.0}

    y = np.full(tokens * ROWS, np.nan, np.float32)
    _native.linear(x.ravel(), "float32", *parts, y, bias=bias, **adapter, simd=simd)
    h, g = 2.0 * (x @ a.T), 2.0 * (dy @ b)
    np.testing.assert_allclose(y.reshape(tokens, ROWS), x @ dense.T + h @ b.T + bias, 1e-4, 1e-3)

    dx = np.full(tokens * COLS, np.nan, np.float32)
    _native.linear_backward(dy.ravel(), "float32", *parts, dx, **adapter, simd=simd)
    np.testing.assert_allclose(dx.reshape(tokens, COLS), dy @ dense + g @ a, 1e-4, 1e-3)

    da, db = np.full(RANK * COLS, np.nan, np.float32), np.full(ROWS * RANK, np.nan, np.float32)
    _native.lora_gradients(
        x.ravel(),
        dy.ravel(),
        "float32",
        flat_a,
        flat_b,
        lora_dtype,
        RANK,
        2.0,
        grad_a=da,
        grad_b=db,
        simd=simd,
    )
    np.testing.assert_allclose(da.reshape(RANK, COLS), g.T @ x, 1e-4)
    np.testing.assert_allclose(db.reshape(ROWS, RANK), dy.T @ h, 1e-4)


def lend(array: np.ndarray) -> _native.Buffer:
    return _native.Buffer(array.ctypes.data, array.size, str(array.dtype), array)


@pytest.mark.parametrize("kind", ["plain", "nested", "int8"])
def test_buffers_serve_as_arrays_do(kind: str) -> None:
    rng = np.random.default_rng(2)
    parts, _ = weight(kind, rng)
    x, y, other = rng.random(COLS, np.float32), *np.full((2, ROWS), np.nan, np.float32)
    _native.linear(x, "float32", *parts, y)
    tables = (1, 3)
    lent = [
        lend(part) if isinstance(part, np.ndarray) and i not in tables else part
        for i, part in enumerate(parts)
    ]
    _native.linear(lend(x), "float32", *lent, lend(other))
    np.testing.assert_array_equal(y, other)


def test_buffers_that_cannot_be_are_refused() -> None:
    x = np.zeros(COLS, np.float32)
    at = x.ctypes.data
    with pytest.raises(DTypeError, match="float64: allowed are float32"):
        _native.Buffer(at, 1, "float64", x)
    for address, numel in ((0, 1), (at + 1, 1), (at, 2**62), (2**64 - 8, 4)):
        with pytest.raises(ShapeError, match="aligned values of float32"):
            _native.Buffer(address, numel, "float32", x)
    assert _native.Buffer(0, 0, "float32", None)  # what an empty tensor gives

    parts, _ = weight("plain", np.random.default_rng(1))
    with pytest.raises(DTypeError, match="packed has dtype float32: pass uint8"):
        _native.linear(x, "float32", lend(x), *parts[1:], np.empty(ROWS, np.float32))
    with pytest.raises(ShapeError, match="values and values share memory"):
        _native.linear(lend(x), "float32", *parts, lend(x[:ROWS]))


def test_arguments_that_do_not_fit_are_refused() -> None:
    parts, _ = weight("plain", np.random.default_rng(1))
    x, y = np.zeros(2 * COLS, np.float32), np.zeros(2 * ROWS, np.float32)
    with pytest.raises(FormatError, match='allowed are "exact" and "int8"'):
        _native.linear(x, "float32", *parts, y, compute="fp8")
    with pytest.raises(ShapeError, match="x has length 255, but 2 tokens need 256"):
        _native.linear(x[:-1], "float32", *parts, y)
    with pytest.raises(ShapeError, match="shares memory with another array"):
        _native.linear_backward(x[: 2 * ROWS], "float32", *parts, x)
    with pytest.raises(ShapeError, match="an adapter is lora_a and lora_b"):
        _native.linear(x, "float32", *parts, y, lora_a=np.zeros(COLS, np.float32))
    a, b = np.zeros(COLS, np.float32), np.zeros(1, np.float32)
    with pytest.raises(ShapeError, match="lora_B has length 1, but"):
        _native.linear(x, "float32", *parts, y, lora_a=a, lora_b=b)
    with pytest.raises(DTypeError, match="values has dtype float32: pass uint16"):
        _native.linear(x, "bfloat16", *parts, y)
    packed, code, absmax, *_ = parts
    with pytest.raises(FormatError, match="8-bit scales need nested_code"):
        _native.linear(
            x, "float32", packed, code, absmax, None, None, absmax[:1], 64, ROWS, COLS, y
        )
