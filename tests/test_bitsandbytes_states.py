"""States that bitsandbytes wrote decode to what its format says, where its own decoder does not."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import qkern
from qkern import _native, codec, functional, reference
from qkern.formats import DTYPES, QuantFormat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

# (shape, blocksize): rows of whole blocks.
WHOLE_ROWS = [((64, 256), 64), ((48, 512), 128), ((8, 4096), 4096), ((4, 16, 192), 32)]
# Blocks that cross rows, rows shorter than a block, odd counts, fewer values than a block.
CROSSING_ROWS = [
    ((64, 96), 64),
    ((33, 480), 64),
    ((17, 720), 64),
    ((12, 4304), 64),
    ((40, 400), 64),
    ((40, 32), 64),
    ((64, 64), 128),
    ((31, 336), 256),
    ((6, 1040), 2048),
    ((5, 10, 48), 64),
    ((7, 33), 32),
    ((1031,), 64),
    ((3, 5), 64),
    ((1, 1), 64),
]


def weights(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Rows of unlike sizes: a scale of the wrong block shows."""
    rows = torch.randn(*shape[:-1], 1).exp()
    return (torch.randn(shape) * rows).to(getattr(torch, dtype))


def plain_decoding(packed: Tensor, state: bnb.QuantState, dtype: torch.dtype) -> Tensor:
    """The documented format, and nothing else: code * absmax in fp32, rounded once."""
    numel = state.shape.numel()
    codes = packed.reshape(-1).int()
    nibbles = torch.stack([codes // 16, codes % 16], dim=1).reshape(-1)[:numel]
    absmax = state.absmax
    if state.nested:
        group = torch.arange(absmax.numel()) // state.state2.blocksize
        absmax = state.state2.code[absmax.int()] * state.state2.absmax[group] + state.offset
    block = torch.arange(numel) // state.blocksize
    return (state.code[nibbles] * absmax[block]).to(dtype).reshape(state.shape)


def parts_of(packed: Tensor, state: bnb.QuantState) -> reference.Parts:
    """qkern's names for the tensors of a state."""
    if not state.nested:
        return reference.Parts(packed.reshape(-1), state.absmax, None, None)
    return reference.Parts(
        packed.reshape(-1), state.absmax, state.state2.absmax, state.offset.reshape(1)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def on_body(body: str, parts: reference.Parts, fmt: QuantFormat, like: Tensor) -> Tensor:
    """The values that one SIMD body decodes, in the dtype and shape of ``like``."""
    arrays = codec.Parts(*(None if part is None else part.numpy() for part in parts))
    absmax, code = codec.decode_absmax(arrays), codec.code_array(fmt.quant_type)
    dtype = str(like.dtype).removeprefix("torch.")
    out = np.full(like.numel(), 0x7FFF, np.float32 if dtype == "float32" else np.uint16)
    _native.dequantize_4bit(arrays.packed, absmax, code, fmt.blocksize, out, dtype, simd=body)
    signed = torch.from_numpy(out.view(np.int32 if dtype == "float32" else np.int16))
    return signed.view(like.dtype).reshape(like.shape)


@pytest.mark.case("B10")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_back_ends_agree_on_states_of_bitsandbytes(
    quant_type: str, nested: bool, tell: Callable[[str], None]
) -> None:
    """qkern by every door and body, the reference, a plain decoding, and bitsandbytes."""
    wrong: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for (shape, blocksize), dtype in (
        (case, dtype) for case in WHOLE_ROWS + CROSSING_ROWS for dtype in DTYPES
    ):
        packed, state = bnb.quantize_4bit(
            weights(shape, dtype),
            blocksize=blocksize,
            quant_type=quant_type,
            compress_statistics=nested,
        )
        where = f"{'x'.join(map(str, shape))} {dtype} by {blocksize}"
        fmt, parts = QuantFormat(quant_type, blocksize, nested), parts_of(packed, state)
        q = qkern.QuantizedTensor.from_parts(parts, fmt, shape, state.dtype)
        for out in DTYPES:
            out_dtype = getattr(torch, out)
            expected = plain_decoding(packed, state, out_dtype)
            same = torch.equal(bits(qkern.dequantize(q, out_dtype)), bits(expected))
            assert same, f"{where} to {out}"
            numel = expected.numel()
            oracle = reference.dequantize(parts, fmt, numel, out_dtype).reshape(shape)
            assert torch.equal(bits(oracle), bits(expected)), f"reference, {where} to {out}"
            for body in _native.available_simd():
                decoded = on_body(body, parts, fmt, expected)
                assert torch.equal(bits(decoded), bits(expected)), f"{body}, {where} to {out}"

        # Some shapes it would compile for half a minute.
        with torch.compiler.set_stance("force_eager"):
            theirs = bnb.dequantize_4bit(packed, state).reshape(shape)
        expected = plain_decoding(packed, state, state.dtype)
        if (shape, blocksize) in WHOLE_ROWS:
            assert torch.equal(theirs, expected), where
        rows = where.replace(dtype, "values")
        wrong[rows] += int((theirs != expected).sum())
        total[rows] += expected.numel()
    kind = f"{quant_type}, {'nested' if nested else 'fp32'} scales"
    lines = [f"right in qkern, wrong in bitsandbytes' own dequantizer ({kind}):"]
    lines += [f"  {rows:24} {wrong[rows]:6} of {total[rows]}" for rows in total if wrong[rows]]
    tell("\n".join(lines))


def test_a_state_of_bitsandbytes_opens_as_an_array() -> None:
    packed, state = bnb.quantize_4bit(
        weights((17, 720), "float32"), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    arrays = (part.numpy() for part in parts_of(packed, state))
    q = qkern.QuantizedArray(*arrays, QuantFormat("nf4", 64), (17, 720), "float32")
    expected = plain_decoding(packed, state, torch.float32)
    np.testing.assert_array_equal(qkern.dequantize(q), expected.numpy())
    assert torch.equal(functional.from_array(q).dequantize(), expected)
