"""Bytes equal to bitsandbytes' CPU encoder on every SIMD body; its scales; its files, both ways."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import CODES, Case, as_tensor, from_bits, generated_cases, midpoints
from torch import nn

import qkern
from qkern import _native, codec
from qkern.formats import BLOCKSIZES, DTYPES, QuantFormat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

BODIES = _native.available_simd()
F32 = npt.NDArray[np.float32]


def bitsandbytes_bytes(case: Case) -> tuple[np.ndarray, F32]:
    """Packed codes and scales that bitsandbytes writes."""
    packed, state = bnb.quantize_4bit(
        as_tensor(case.bits, case.dtype).reshape(case.shape),
        blocksize=case.blocksize,
        quant_type=case.quant_type,
    )
    return packed.numpy().reshape(-1), state.absmax.numpy()


def our_bytes(case: Case, body: str, nonfinite: str = "error") -> tuple[np.ndarray, F32]:
    """Packed codes and scales that one SIMD body writes into poisoned memory."""
    n = case.bits.size
    packed = np.full(-(-n // 2), 0xAB, np.uint8)
    absmax = np.full(-(-n // case.blocksize), -1, np.float32)
    _native.quantize_4bit(
        case.bits,
        case.dtype,
        codec.code_array(case.quant_type),
        case.blocksize,
        packed,
        absmax,
        nonfinite=nonfinite,
        simd=body,
    )
    return packed, absmax


# -- codes and scales ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded() -> list[tuple[Case, np.ndarray, F32]]:
    """The generated cases with bitsandbytes' packed codes and scales."""
    return [(case, *bitsandbytes_bytes(case)) for case in generated_cases()]


@pytest.mark.parametrize("body", BODIES)
def test_packed_bytes_and_absmax_equal(
    body: str,
    encoded: list[tuple[Case, np.ndarray, F32]],
    tell: Callable[[str], None],
) -> None:
    for case, packed, absmax in encoded:
        ours, our_absmax = our_bytes(case, body)
        np.testing.assert_array_equal(ours, packed, err_msg=str(case))
        np.testing.assert_array_equal(
            our_absmax.view(np.uint32), absmax.view(np.uint32), err_msg=str(case)
        )
    patterns, shapes = ({case[i] for case, *_ in encoded} for i in (0, 2))
    tell(
        f"{len(encoded)} cases byte-equal to bitsandbytes on {body}: {len(patterns)} "
        f"patterns of values, {len(shapes)} shapes"
    )


def test_generated_cases_hold_what_is_hard() -> None:
    """All settings; values at every boundary, and one place of the dtype to both sides of it."""
    cases = list(generated_cases())
    assert len(cases) >= 2000
    settings = {(case.dtype, case.quant_type, case.blocksize) for case in cases}
    assert settings == set(itertools.product(DTYPES, CODES, BLOCKSIZES))
    found = set()
    for case in cases:
        if case.pattern != "near_bounds" or case.bits.size < case.blocksize:
            continue
        whole = case.bits.size // case.blocksize * case.blocksize
        blocks = from_bits(case.bits, case.dtype)[:whole].reshape(-1, case.blocksize)
        scaled = blocks * (np.float32(1) / np.abs(blocks).max(axis=1, keepdims=True))
        # one place, for a value that is less accurate by half a place than its absmax permits
        epsilon = {"float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}[case.dtype]
        for i, bound in enumerate(midpoints(CODES[case.quant_type])):
            distance = scaled.astype(np.float64) - bound
            near = distance[np.abs(distance) <= max(abs(bound) * epsilon, 1e-4 * (bound == 0))]
            found |= {(case.dtype, case.quant_type, i, side) for side in np.sign(near)}
            found |= {(case.dtype, case.quant_type, i, 0) for _ in near[:1]}
    assert len(found) == 3 * 2 * 15 * 3


@pytest.mark.parametrize("body", BODIES)
def test_kept_nan_and_infinity_give_the_same_bytes(body: str) -> None:
    rng = np.random.default_rng(1)
    for dtype, quant_type, n in itertools.product(DTYPES, CODES, (65, 333, 4096)):
        values = rng.standard_normal(n).astype(np.float32)
        for bad in (np.nan, np.inf, -np.inf):
            values[rng.integers(n)] = bad
        values[-1] = -np.inf  # the ragged block too
        tensor = torch.from_numpy(values).to(getattr(torch, dtype))
        raw = {"float32": torch.float32}.get(dtype, torch.int16)
        bits = tensor.view(raw).numpy().view(np.float32 if dtype == "float32" else np.uint16)
        case = Case("nonfinite", bits, (n,), dtype, quant_type, 64)
        packed, absmax = our_bytes(case, body, nonfinite="keep")
        theirs, their_absmax = bitsandbytes_bytes(case)
        np.testing.assert_array_equal(packed, theirs, err_msg=str(case))
        np.testing.assert_array_equal(absmax, their_absmax, err_msg=str(case))


# -- double-quantized scales -----------------------------------------------------------------


def weights_with_scales() -> Iterator[tuple[str, F32]]:
    """Blocks of 32 whose maxima are spread in many ways: (name, (blocks, 32))."""
    rng = np.random.default_rng(0)
    for blocks, repeat in itertools.product((1, 2, 255, 256, 257, 600, 2000), range(6)):
        scales = {f"lognormal {s}": np.exp(s * rng.standard_normal(blocks)) for s in (0, 0.3, 1, 3)}
        scales["uniform"] = rng.uniform(0.5, 1.5, blocks)
        scales["near 1"] = 1 + 1e-3 * rng.standard_normal(blocks)
        scales["equal"] = np.full(blocks, 0.0371)
        scales["few"] = rng.choice([0.5, 0.25, 0.125, 0.0], blocks)
        for name, scale in scales.items():
            values = rng.standard_normal((blocks, 32))
            if name in ("equal", "few", "near 1"):
                values /= np.abs(values).max(axis=1, keepdims=True)
            yield f"{blocks} {name}, {repeat}", (values * scale[:, None]).astype(np.float32)


def test_double_quantized_codes_are_the_nearest_and_neighbours_of_bitsandbytes(
    tell: Callable[[str], None],
) -> None:
    """bitsandbytes looks codes up in 65,536 bins and sums its mean in fp32; qkern does neither."""
    table = codec.nested_code_array()
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    cases = compared = different = same_offset = 0
    for name, weights in weights_with_scales():
        absmax = codec.encode(weights.reshape(-1), "float32", QuantFormat("nf4", 32, False)).absmax
        codes, nested, offset, _ = codec.encode_absmax(absmax)
        assert offset[0] == np.float32(math.fsum(absmax) / absmax.size), name

        # Each code is the nearest one, a tie goes to the lower.
        group = nested.repeat(256)[: absmax.size]
        with np.errstate(invalid="ignore"):
            scaled = np.where(group == 0, np.float32(0), (absmax - offset) / group)
        np.testing.assert_array_equal(codes, np.searchsorted(bounds, scaled), err_msg=name)
        distances = np.abs(table.astype(np.float64) - scaled.astype(np.float64)[:, None])
        chosen = np.take_along_axis(distances, codes[:, None].astype(int), axis=1)[:, 0]
        assert (chosen <= distances.min(axis=1) + np.spacing(np.abs(scaled)) / 2).all(), name

        _, state = bnb.quantize_4bit(
            torch.from_numpy(weights), blocksize=32, quant_type="nf4", compress_statistics=True
        )
        their_offset = np.float32(state.offset)
        assert abs(their_offset - offset[0]) <= 1e-6 * offset[0], name
        # In a group of equal scales only rounding is left to code.
        live = group > offset[0] * 2.0**-12
        mine, theirs = codes[live].astype(int), state.absmax.numpy()[live].astype(int)
        # Its bins cannot tell the codes around 0 apart.
        in_one_bin = np.abs(table[mine] - table[theirs]) <= 2 / 65535
        assert ((np.abs(mine - theirs) <= 1) | in_one_bin).all(), name
        cases += 1
        same_offset += int(their_offset == offset[0])
        compared += mine.size
        different += int((mine != theirs).sum())
    assert cases >= 300
    assert different < 0.01 * compared
    tell(
        f"{cases} tensors of double-quantized scales, each the nearest code: "
        f"{100 * different / compared:.2f} % of {compared} differ from bitsandbytes' "
        f"(neighbours); {same_offset} offsets equal, the others but for fp32 sums"
    )


# -- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_our_state_dict_opens_in_linear4bit(double_quant: bool) -> None:
    torch.manual_seed(0)
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(128, 64), double_quant=double_quant)
    state = ours.state_dict()
    stats = {k: v for k, v in state.items() if k.startswith("weight.")}
    import bitsandbytes

    theirs = bitsandbytes.nn.Params4bit.from_prequantized(
        state["weight"], stats, requires_grad=False, device="cpu"
    )
    dense = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, ours.weight.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_of_linear4bit_opens_here(double_quant: bool) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 64, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(128, 64))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = bnb.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.weight.dequantize(), expected)
