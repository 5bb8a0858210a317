"""Any shape, strides, dtype, format and method, through both doors, against the reference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import CODES, as_bits, value_patterns
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import qkern
from qkern import reference
from qkern.codec import METHODS, Parts
from qkern.formats import BLOCKSIZES, DTYPES, QUANT_TYPES, QuantFormat

PATTERNS = tuple(name for name, _ in value_patterns(1, np.random.default_rng(0)))
# Those with no block so small that its products are rounded as subnormals.
ORDINARY = tuple(
    p for p in PATTERNS if p not in ("subnormal", "around_the_floor", "tiny", "every_magnitude")
)
MAX_VALUES = 1 << 14

Quantized = qkern.QuantizedArray | qkern.QuantizedTensor
ML_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Case(NamedTuple):
    """Values, the view of them that is quantized, and the format.

    The view: axes permuted, sliced, then repeated without a copy.
    """

    shape: tuple[int, ...]
    pattern: str
    dtype: str
    seed: int
    axes: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]  # how many values to drop first, and a step
    repeats: int  # size of a leading dimension of stride 0, or 0 for no such dimension
    format: QuantFormat

    def values(self) -> np.ndarray:
        """Contiguous, of ``shape``; bfloat16 as ``ml_dtypes`` holds it."""
        rng = np.random.default_rng(self.seed)
        flat = dict(value_patterns(math.prod(self.shape), rng))[self.pattern]
        return as_bits(flat, self.dtype).view(ML_DTYPES[self.dtype]).reshape(self.shape)

    def array(self) -> np.ndarray:
        """A view of ``values``; a negative step reverses."""
        view = self.values().transpose(self.axes)
        slices = (slice(a if step > 0 else -1 - a, None, step) for a, step in self.slices)
        view = view[(*slices, ...)]
        return np.broadcast_to(view, (self.repeats, *view.shape)) if self.repeats else view

    def tensor(self) -> Tensor:
        """A view of ``values``; torch has no negative steps."""
        view = as_torch(self.values()).permute(self.axes)
        view = view[(*(slice(a, None, abs(step)) for a, step in self.slices), ...)]
        return view.expand(self.repeats, *view.shape) if self.repeats else view


@st.composite
def cases(
    draw: st.DrawFn,
    patterns: tuple[str, ...] = PATTERNS,
    quant_types: tuple[str, ...] = QUANT_TYPES,
    double_quant: tuple[bool, ...] = (False, True),
) -> Case:
    """0 to 4 dimensions, some of size 0, in any order and steps; any dtype and format."""
    sizes = st.sampled_from([1, 2, 3, 5, 16, 31, 33, 64, 65, 96, 257, 0])
    shape = draw(st.lists(sizes, max_size=4).filter(lambda s: math.prod(s) <= MAX_VALUES))
    steps = st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 3, -1, -2]))
    return Case(
        shape=tuple(shape),
        pattern=draw(st.sampled_from(patterns)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
        axes=tuple(draw(st.permutations(range(len(shape))))),
        slices=tuple(draw(steps) for _ in shape),
        repeats=draw(st.sampled_from([0, 0, 0, 2])),
        format=QuantFormat(
            draw(st.sampled_from(quant_types)),
            draw(st.sampled_from(BLOCKSIZES)),
            draw(st.sampled_from(double_quant)),
        ),
    )


def as_torch(values: np.ndarray) -> Tensor:
    """A contiguous tensor with the values of an array of any strides."""
    copy = values.copy()
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def parts_of(q: Quantized) -> reference.Parts:
    """Codes and scales as flat tensors, of an array or a tensor."""
    parts = (q.packed, q.absmax, q.nested_absmax, q.offset)
    return reference.Parts(
        *(None if part is None else torch.as_tensor(part).reshape(-1) for part in parts)  # type: ignore[arg-type]
    )


def same_bytes(a: reference.Parts | Parts, b: reference.Parts | Parts) -> bool:
    """Whether all parts have the same dtypes and bytes."""
    return all(
        (x is None) == (y is None)
        and (x is None or (x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes()))
        for x, y in zip(a, b, strict=True)
    )


def bits(values: Any) -> np.ndarray:
    """The bit patterns of an array or a tensor."""
    if isinstance(values, Tensor):
        return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16).numpy()
    return values.view(np.int32 if values.dtype == np.float32 else np.int16)


def expected_parts(dense: Tensor, fmt: QuantFormat) -> tuple[reference.Parts, QuantFormat]:
    """What ``method="absmax"`` has to write, and in which format: fp32 scales where 8 bits fail."""
    plain = fmt.replace(double_quant=False)
    parts = reference.quantize(dense, plain)
    if not fmt.double_quant:
        return parts, plain
    nested = reference.quantize_absmax(parts.absmax)
    if reference.scales_are_safe(parts.absmax, reference.dequantize_absmax(*nested)):
        return reference.Parts(parts.packed, *nested), fmt
    return parts, plain


def block_errors(dense: Tensor, parts: reference.Parts, fmt: QuantFormat) -> Tensor:
    """Sum of squares of what decoding loses, per block, fp64."""
    decoded = reference.dequantize(parts, fmt, dense.numel(), torch.float32)
    lost = (dense.reshape(-1).double() - decoded.double()).square()
    padded = torch.nn.functional.pad(lost, (0, -lost.numel() % fmt.blocksize))
    return padded.reshape(-1, fmt.blocksize).sum(dim=1)


def check_codes(q: Quantized, dense: Tensor, fmt: QuantFormat, method: str) -> None:
    """Absmax has the reference's bytes; any other method is nowhere worse, scale for scale."""
    fmt = fmt.for_shape(dense.shape)  # an int8 row gets its length
    best, best_format = expected_parts(dense, fmt)
    if method == "absmax":
        assert q.format == best_format
        assert same_bytes(parts_of(q), best)
    elif not fmt.double_quant:
        assert q.format == fmt
        ours, theirs = (block_errors(dense, parts, fmt) for parts in (parts_of(q), best))
        # Errors are compared in fp32 where they are made.
        assert bool((ours <= theirs * (1 + 1e-6)).all())


def check_decoding(q: Quantized) -> None:
    """Whatever chose the codes, they decode as the reference decodes them."""
    parts, numel = parts_of(q), math.prod(q.shape)
    for name in DTYPES:
        dtype = getattr(torch, name)
        expected = reference.dequantize(parts, q.format, numel, dtype).reshape(tuple(q.shape))
        decoded = qkern.dequantize(q, dtype if isinstance(q, Tensor) else name)
        assert tuple(decoded.shape) == tuple(q.shape)
        np.testing.assert_array_equal(bits(decoded), bits(expected))


# int8 has one method only.
METHODS_AND_TYPES = [
    (method, QUANT_TYPES if method == "absmax" else tuple(CODES)) for method in METHODS
]
every_method = pytest.mark.parametrize(("method", "quant_types"), METHODS_AND_TYPES, ids=METHODS)


@every_method
@given(data=st.data())
def test_arrays_quantize_and_decode_as_the_reference_says(
    method: str, quant_types: tuple[str, ...], data: st.DataObject
) -> None:
    case = data.draw(cases(quant_types=quant_types))
    values = case.array()
    q = qkern.quantize(values, case.format, method=method)
    assert (q.shape, q.dtype) == (values.shape, case.dtype)
    dense = as_torch(values)
    check_codes(q, dense, case.format, method)
    check_decoding(q)
    copy = qkern.quantize(values.copy(), case.format, method=method)
    assert same_bytes(parts_of(copy), parts_of(q))
    tensor = qkern.quantize(dense, case.format, method=method)
    assert tensor.format == q.format
    assert same_bytes(parts_of(tensor), parts_of(q))


@every_method
@given(data=st.data())
def test_tensors_quantize_and_decode_as_the_reference_says(
    method: str, quant_types: tuple[str, ...], data: st.DataObject
) -> None:
    case = data.draw(cases(quant_types=quant_types))
    values = case.tensor()
    q = qkern.quantize(values, case.format, method=method)
    assert (q.shape, q.dtype) == (values.shape, values.dtype)
    check_codes(q, values, case.format, method)
    check_decoding(q)
    copy = qkern.quantize(values.contiguous(), case.format, method=method)
    assert same_bytes(parts_of(copy), parts_of(q))


@every_method
@given(data=st.data(), out_dtype=st.sampled_from(DTYPES))
def test_out_gets_what_a_fresh_result_holds(
    method: str, quant_types: tuple[str, ...], data: st.DataObject, out_dtype: str
) -> None:
    case = data.draw(cases(quant_types=quant_types))
    values = case.array()
    array = qkern.quantize(values, case.format, method=method)
    out = np.full(values.shape, np.nan, ML_DTYPES[out_dtype])
    assert qkern.dequantize(array, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(qkern.dequantize(array, out_dtype)))

    tensor = qkern.quantize(as_torch(values), case.format, method=method)
    fresh = qkern.dequantize(tensor, getattr(torch, out_dtype))
    poisoned = torch.full_like(fresh, torch.nan)
    every_other = torch.full((*fresh.shape, 2), torch.nan, dtype=fresh.dtype)[..., 0]
    for target in (poisoned, every_other):
        assert qkern.dequantize(tensor, out=target) is target
        np.testing.assert_array_equal(bits(target.contiguous()), bits(fresh))


@given(case=cases(patterns=ORDINARY, double_quant=(False,)))
def test_quantizing_what_was_decoded_changes_nothing(case: Case) -> None:
    """The absmax of a block has a code of its own; an int8 step is rounded, so only in fp32."""
    assume(case.format.bits == 4 or case.dtype == "float32")
    q = qkern.quantize(as_torch(case.array()), case.format)
    smallest = 1e-4 if case.dtype == "float16" else 1e-30
    assume(not bool(((q.absmax > 1.1e-38) & (q.absmax < smallest)).any()))
    decoded = q.dequantize()
    again = qkern.quantize(decoded, case.format)
    if case.format.bits == 8:
        assert torch.equal(again.packed, q.packed)
        torch.testing.assert_close(again.absmax, q.absmax, rtol=2.0**-22, atol=0)
        return
    assert torch.equal(again.absmax, q.absmax)
    assert torch.equal(again.dequantize(), decoded)
    if case.format.quant_type == "nf4":  # FP4 has two codes of value 0
        assert torch.equal(again.packed, q.packed)
