"""What launches check, and what they keep between calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_device import DEVICE

from qkern import kernels, reference
from qkern.errors import DeviceError, DTypeError, ShapeError
from qkern.formats import QuantFormat
from qkern.ops import dequantize_torch, device_projections

pytest.importorskip("triton")
from qkern.kernels import launch, quantize, quantize_absmax


def parts_of(fmt: QuantFormat, *shape: int) -> reference.Parts:
    return reference.quantize(torch.randn(shape), fmt)


def test_weights_whose_rows_are_whole_blocks_fit() -> None:
    nf4, rows = QuantFormat("nf4", 64), QuantFormat("int8_row", 63)
    assert launch.fits(nf4, (5, 128))
    assert launch.fits(rows, (5, 63))
    assert not launch.fits(nf4, (5, 96))  # a block and a half
    assert not launch.fits(nf4, (0, 64))
    assert not launch.fits(nf4, (2, 3, 64))
    assert not launch.fits(nf4, (2**31, 64))


def test_a_weight_that_does_not_fit_names_its_shape() -> None:
    fmt = QuantFormat("nf4", 64)
    with pytest.raises(ShapeError, match=r"nf4 of shape \(2, 96\) in blocks of 64"):
        launch.weight(*parts_of(fmt, 2, 96), fmt, (2, 96))
    with pytest.raises(ShapeError, match="packed has 64 values"):
        launch.weight(*parts_of(fmt, 2, 64), fmt, (4, 64))


def test_parts_of_another_device_are_refused() -> None:
    fmt = QuantFormat("nf4", 64)
    parts = parts_of(fmt, 2, 64)
    parts = parts._replace(absmax=parts.absmax.to("meta"))
    with pytest.raises(DeviceError, match=f"{DEVICE}, meta"):
        launch.weight(*parts, fmt, (2, 64))


def test_scales_that_stayed_fp32_decide_the_format() -> None:
    fmt = QuantFormat("nf4", 64, double_quant=True)
    parts = parts_of(fmt.replace(double_quant=False), 2, 64)
    assert not launch.weight(*parts, fmt, (2, 64)).constants["DOUBLE_QUANT"]


def test_operands_of_other_dtypes_are_refused() -> None:
    with pytest.raises(DTypeError, match=r"x has dtype torch\.float64"):
        launch.operand(torch.zeros(2, 64, dtype=torch.float64), 64, "x")
    with pytest.raises(ShapeError, match="x has shape"):
        launch.operand(torch.zeros(64, 2), 64, "x")


def test_operands_are_contiguous_and_aligned() -> None:
    x = torch.randn(64, 3).T
    assert launch.operand(x, 64, "x").is_contiguous()
    shifted = torch.randn(129)[1:].view(2, 64)
    assert launch.operand(shifted, 64, "x").data_ptr() % 16 == 0
    aligned = torch.randn(2, 64)
    assert launch.operand(aligned, 64, "x").data_ptr() == aligned.data_ptr()


def test_codes_at_an_odd_place_are_copied_to_where_words_can_be_read() -> None:
    fmt = QuantFormat("nf4", 64)
    parts = parts_of(fmt, 2, 64)
    odd = torch.empty(65, dtype=torch.uint8)[1:].copy_(parts.packed)
    packed = launch.weight(odd, *parts[1:], fmt, (2, 64)).pointers[0]
    assert packed.data_ptr() % 16 == 0
    assert torch.equal(packed, parts.packed)


def test_tables_begin_with_the_codes_of_four_bits() -> None:
    fmt = QuantFormat("fp4")
    tables = launch.tables_of(fmt.code, DEVICE)
    assert tables.shape == (16 + 256,)
    assert torch.equal(tables[:16], torch.tensor(fmt.code))


def test_more_counters_than_there_are_are_refused() -> None:
    with pytest.raises(ShapeError, match="do not split it"):
        launch.counters(DEVICE, launch.COUNTERS + 1)


@pytest.mark.parametrize(("rank", "step"), [(0, 16), (1, 16), (16, 16), (17, 32), (256, 64)])
def test_ranks_are_multiplied_in_steps_that_tensor_cores_take(rank: int, step: int) -> None:
    assert launch.rank_step(rank) == step


# What is kept on a device from one call to the next.
KEPT: dict[str, Callable[[torch.device], Any]] = {
    "counters": lambda device: launch._counters(device, 7),
    "codes": lambda device: launch.tables_of(None, device),
    "midpoints": lambda device: quantize._search_tables("nf4", device),
    "midpoints of scales": quantize_absmax._bounds,
    "scaling": lambda device: device_projections._by_column(((0.5, 2), (1.0, 3)), device),
    "codes of torch": lambda device: dequantize_torch._tables(None, device),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_not_allocated_in_the_pool_of_a_compiled_functions_graphs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch gives all that this thread allocates to graphs, which use it again."""
    asked: list[torch.device] = []

    def refuse(device: torch.device, make: Callable[[], Any]) -> Any:
        asked.append(device)
        raise ZeroDivisionError

    for module in (kernels, launch, quantize, quantize_absmax):
        monkeypatch.setattr(module, "lasting", refuse)
    with pytest.raises(ZeroDivisionError):
        KEPT[name](torch.device("cuda", 13))
    assert asked == [torch.device("cuda", 13)]


def test_what_lasts_is_made_by_another_thread_on_the_same_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered = []

    @contextlib.contextmanager
    def stream(which: object) -> Any:
        entered.append((which, threading.get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    maker = kernels.lasting(torch.device("cuda", 1), threading.get_ident)
    assert maker != threading.get_ident()
    assert entered == [("stream of cuda:1", maker)]
    with pytest.raises(ZeroDivisionError):
        kernels.lasting(torch.device("cuda", 1), lambda: 1 // 0)
