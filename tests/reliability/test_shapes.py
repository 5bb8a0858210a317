"""Any shape and strides: the bytes of the reference, or an error that says what is allowed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from bodies import BODIES, decode_on, encode_on, same_bits
from format_cases import FORMATS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import qkern
from qkern import flat_keys, reference
from qkern.formats import BLOCKSIZES, QuantFormat
from qkern.layers import QLoRALinear

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# bitsandbytes' CPU dequantizer is wrong on 96, 480, 720; 1176 is no multiple of 16 at that
RAGGED_ROWS = (96, 480, 720, 1176)
# fewer values than a block; one; odd; prime; a prime of blocks and one value more
ODD_SIZES = (1, 2, 3, 31, 63, 65, 127, 251, 509, 64 * 7 + 1)


def assert_bytes_of_the_reference(values: Tensor, fmt: QuantFormat, body: str) -> None:
    """Codes, scales and values of one body, and those of the front door, are the reference's."""
    plain = fmt.replace(double_quant=False)
    expected = reference.quantize(values, plain)
    packed, absmax = encode_on(body, values, plain)
    assert torch.equal(packed, expected.packed)
    assert same_bits(absmax, expected.absmax)
    for dtype in FLOATS:
        dense = reference.dequantize(expected, plain, values.numel(), dtype)
        assert same_bits(decode_on(body, packed, absmax, plain, values.numel(), dtype), dense)
    q = qkern.quantize(values, fmt)
    wanted = reference.quantize(values, q.format)
    assert q.shape == values.shape
    assert torch.equal(q.packed.reshape(-1), wanted.packed)
    assert same_bits(q.absmax, wanted.absmax)
    dense = reference.dequantize(wanted, q.format, values.numel(), values.dtype)
    assert same_bits(qkern.dequantize(q).reshape(-1), dense)


@pytest.mark.case("A1", "A2", "A4")
@pytest.mark.parametrize("body", BODIES)
@given(
    rows=st.integers(1, 5),
    columns=st.one_of(st.sampled_from((*RAGGED_ROWS, *ODD_SIZES)), st.integers(1, 300)),
    blocksize=st.sampled_from(BLOCKSIZES),
    quant_type=st.sampled_from(("nf4", "fp4", "int8")),
    double_quant=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
def test_rows_of_any_length(
    body: str,
    rows: int,
    columns: int,
    blocksize: int,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_bytes_of_the_reference(values, QuantFormat(quant_type, blocksize, double_quant), body)


@pytest.mark.case("A1")
@pytest.mark.parametrize("columns", RAGGED_ROWS)
def test_rows_that_are_no_whole_blocks(columns: int) -> None:
    values = torch.randn(7, columns)
    for body in BODIES:
        for blocksize in (64, 256):
            assert_bytes_of_the_reference(values, QuantFormat("nf4", blocksize), body)
    q = qkern.quantize(values, double_quant=False)
    error = (q.dequantize() - values).norm() / values.norm()
    assert error < 0.1  # 0.092 on Gaussian values; with the scales of other blocks 0.25 and more


@pytest.mark.case("A2")
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((64, 128), 256), ((64, 128), 1024), ((3, 4, 64), 512), ((5, 3), 4096)]
)
def test_rows_that_are_shorter_than_a_block(shape: tuple[int, ...], blocksize: int) -> None:
    for body in BODIES:
        for quant_type in ("nf4", "int8"):
            values = torch.randn(shape)
            assert_bytes_of_the_reference(values, QuantFormat(quant_type, blocksize), body)


@pytest.mark.case("A4")
@pytest.mark.parametrize("numel", ODD_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_last_nibble_of_an_odd_count_is_the_code_of_zero(numel: int, quant_type: str) -> None:
    q = qkern.quantize(torch.randn(numel), quant_type)
    assert q.shape == (numel,)
    if numel % 2:
        assert q.format.code[int(q.packed[-1]) & 15] == 0.0
    for body in BODIES:
        assert_bytes_of_the_reference(torch.randn(numel), q.format, body)


@pytest.mark.case("A5")
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0), (2, 0, 3), (), (1,)])
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_nothing_at_all_and_a_single_value(
    shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    values = torch.randn(shape)
    q = qkern.quantize(values, quant_type, double_quant=double_quant)
    dense = qkern.dequantize(q)
    assert dense.shape == shape
    assert q.packed.numel() == q.format.packed_size(values.numel())
    assert q.absmax.numel() == q.format.num_blocks(values.numel())
    if len(shape) > 1 or quant_type != "int8_row":  # whose files hold layers alone
        entries = load(save(flat_keys.flatten(q, "w")))
        again = flat_keys.unflatten(entries, "w", values.dtype)
        assert again.format == q.format
        assert same_bits(again.dequantize(), dense)
    array = qkern.quantize(values.numpy(), quant_type, double_quant=double_quant)
    np.testing.assert_array_equal(qkern.dequantize(array), dense.numpy())


@pytest.mark.case("A5")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(sizes: tuple[int, int]) -> None:
    dense = nn.Linear(*sizes)
    layer = QLoRALinear.from_linear(dense, r=2)
    layer.load_state_dict(layer.state_dict())
    x = torch.randn(3, sizes[0], requires_grad=True)
    y = layer(x)
    assert torch.equal(y, dense(x))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.case("A6")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_one_dimension_in_is_one_dimension_out(quant_type: str) -> None:
    values = torch.randn(130)
    q = qkern.quantize(values, quant_type)
    assert q.shape == qkern.dequantize(q).shape == (130,)
    assert qkern.dequantize(q, out=torch.empty(130)).shape == (130,)
    assert qkern.dequantize(qkern.quantize(values.numpy(), quant_type)).shape == (130,)


@pytest.mark.case("A7")
@pytest.mark.parametrize("shape", [(4, 8, 128), (3, 2, 4, 64), (5, 24, 96)])
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_an_expert_of_a_stack_is_quantized_as_by_itself(
    shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    stack = torch.randn(shape)
    q = qkern.quantize(stack, quant_type, double_quant=double_quant)
    plain = qkern.quantize(stack, quant_type, double_quant=False)
    for i, expert in enumerate(stack):  # whole blocks in every expert
        alone = qkern.quantize(expert, quant_type, double_quant=False)
        part = plain[i : i + 1].parts
        assert torch.equal(part.packed.reshape(-1), alone.packed.reshape(-1))
        assert torch.equal(q[i : i + 1].packed.reshape(-1), alone.packed.reshape(-1))
        assert same_bits(part.absmax, alone.absmax)
        assert same_bits(q[i : i + 1].dequantize()[0], q.dequantize()[i])


@pytest.mark.case("A7")
def test_experts_that_share_a_block_slice_to_their_own_values() -> None:
    q = qkern.quantize(torch.randn(3, 5, 7))  # 35 values an expert, blocks of 64 across them
    dense = q.dequantize()
    for i in range(3):
        assert same_bits(q[i : i + 1].dequantize(), dense[i : i + 1])


# -- strides ---------------------------------------------------------------------------------

TORCH_VIEWS = {
    "transposed": lambda t: t.t(),
    "rows": lambda t: t[3:17],
    "columns": lambda t: t[:, 5:70],
    "every second": lambda t: t[::2, ::3],
    "expanded": lambda t: t[:1].expand(9, -1),
    "broadcast": lambda t: t[0, 0].expand(8, 64),
    "permuted": lambda t: t.reshape(4, 5, 96).permute(2, 0, 1),
    "offset": lambda t: t.reshape(-1)[7:],
}


@pytest.mark.case("A8")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("view", TORCH_VIEWS)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_views_of_tensors(
    view: str, dtype: torch.dtype, quant_type: str, double_quant: bool
) -> None:
    values = TORCH_VIEWS[view](torch.randn(20, 96).to(dtype))
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    got = qkern.quantize(values, **settings)
    expected = qkern.quantize(values.clone(memory_format=torch.contiguous_format), **settings)
    assert got.format == expected.format
    for a, b in zip(got.parts, expected.parts, strict=True):
        assert (a is None and b is None) or same_bits(a, b)


ARRAY_VIEWS = {
    "negative strides": lambda a: a[::-1, ::-1],
    "transposed": lambda a: a.T,
    "columns": lambda a: a[:, 5:70],
    "every second": lambda a: a[::2, ::-3],
    "broadcast": lambda a: np.broadcast_to(a[:1], (9, 96)),
    "Fortran order": np.asfortranarray,
}


@pytest.mark.case("A8", "D29")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("view", ARRAY_VIEWS)
def test_views_of_arrays(view: str, dtype: type) -> None:
    base = np.random.default_rng(0).standard_normal((20, 96)).astype(dtype)
    base.flags.writeable = False
    values = ARRAY_VIEWS[view](base)
    for quant_type, double_quant in FORMATS:
        settings = {"quant_type": quant_type, "double_quant": double_quant}
        got = qkern.quantize(values, **settings)
        expected = qkern.quantize(np.ascontiguousarray(values), **settings)
        assert got.packed.tobytes() == expected.packed.tobytes()
        assert got.absmax.tobytes() == expected.absmax.tobytes()
        dense = qkern.dequantize(got)
        assert dense.tobytes() == qkern.dequantize(expected).tobytes()
        assert dense.shape == values.shape


@pytest.mark.case("A8")
@pytest.mark.parametrize("dtype", FLOATS)
def test_out_of_any_strides(dtype: torch.dtype) -> None:
    q = qkern.quantize(torch.randn(6, 70))
    expected = qkern.dequantize(q, dtype)
    for out in (
        torch.empty(6, 70, dtype=dtype),
        torch.empty(70, 6, dtype=dtype).t(),
        torch.empty(6, 140, dtype=dtype)[:, ::2],
        torch.empty(9, 80, dtype=dtype)[2:8, 3:73],
    ):
        out.fill_(7)
        assert qkern.dequantize(q, out=out) is out
        assert same_bits(out, expected)


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (lambda: torch.empty(6, 71), qkern.ShapeError, r"\(6, 70\)"),
        (lambda: torch.empty(1, 70).expand(6, 70), qkern.ShapeError, "clone"),
        (lambda: torch.empty(6, 70, device="meta"), qkern.ShapeError, "on cpu"),
        (lambda: torch.empty(6, 70, dtype=torch.int32), qkern.DTypeError, "int32"),
        (lambda: torch.eye(6, 70).to_sparse(), qkern.ShapeError, "not dense"),
        (lambda: torch.empty(6, 70, requires_grad=True), qkern.FrozenWeightError, "detach"),
        (lambda: qkern.quantize(torch.randn(6, 70)), qkern.DTypeError, "dense torch tensor"),
        (lambda: np.empty((6, 70), np.float32), qkern.DTypeError, "dense torch tensor"),
    ],
)
def test_an_out_that_cannot_be_written(out: object, error: type, text: str) -> None:
    q = qkern.quantize(torch.randn(6, 70))
    with pytest.raises(error, match=text):
        qkern.dequantize(q, out=out())


@pytest.mark.case("A8")
def test_an_out_array_that_cannot_be_written() -> None:
    q = qkern.quantize(np.ones((6, 70), np.float32))
    read_only = np.empty((6, 70), np.float32)
    read_only.flags.writeable = False
    for out, error in (
        (np.empty((70, 6), np.float32).T, qkern.ShapeError),
        (np.empty((6, 70), np.float32)[::-1], qkern.ShapeError),
        (np.empty((6, 71), np.float32), qkern.ShapeError),
        (read_only, qkern.ShapeError),
        (np.empty((6, 70), np.float64), qkern.DTypeError),
        (np.empty((6, 70), ">f4"), qkern.DTypeError),
        (torch.empty(6, 70), qkern.DTypeError),
        ([0.0], qkern.DTypeError),
    ):
        with pytest.raises(error):
            qkern.dequantize(q, out=out)
