"""The layout of an output file: places known beforehand, no gaps, aligned, read by safetensors."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import qkern
from qkern import flat_keys
from qkern.checkpoint import layout as layouts
from qkern.checkpoint.entries import Piece, weight_pieces
from qkern.checkpoint.layout import ShardLayout, Weight, item_size
from qkern.checkpoint.stream import Done
from qkern.formats import KINDS, QuantFormat

FORMATS = [
    QuantFormat(name, 0 if kind.per_row else 64, nested)
    for name, kind in KINDS.items()
    if not kind.decode_only
    for nested in ((False, True) if "nested" in kind.scales else (False,))
]
SHAPES = [(64, 128), (5, 33), (1, 1), (3, 7, 64), (300, 130)]


def parts_of(q: qkern.QuantizedTensor) -> tuple[bytes, bytes]:
    """Codes and scales as a job writes them."""
    packed, absmax, nested, _ = (None if p is None else p.numpy().tobytes() for p in q.parts)
    return packed or b"", (absmax or b"") + (nested or b"")


def write_by_layout(path: Path, tensors: dict[str, Any], fmt: QuantFormat) -> ShardLayout:
    """Dense tensors and quantized ones, each part written to its place, then finished."""
    items: list[Piece | Weight] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, qkern.QuantizedTensor):
            asked = fmt.for_shape(tensor.shape)
            dtype = str(tensor.dtype).removeprefix("torch.")
            items.append(Weight(name, tuple(tensor.shape), dtype, asked))
        else:
            kinds = {torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
            kind = kinds.get(tensor.dtype, "F32")
            items.append(Piece(name, kind, tuple(tensor.shape), tensor.nbytes))
    layout = ShardLayout(path.name, items, {"format": "pt"})
    spill = path.with_suffix(".scales")
    spill.write_bytes(b"\xff" * layout.spill_size)
    path.write_bytes(b"\xff" * layout.body_end)
    done = {}
    for name, tensor in tensors.items():
        content = {}
        if isinstance(tensor, qkern.QuantizedTensor):
            codes, scales = parts_of(tensor)
            content = {name: codes, flat_keys.scales_key(name, tensor.format): scales}
            offset = 0.0 if tensor.offset is None else float(tensor.offset)
            done[name] = Done(0, tensor.format.double_quant, offset, 0, 0, None)
        elif tensor.numel():
            content = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()}
        for key, value in content.items():
            place = layout.places[key]
            with (spill if place.in_spill else path).open("r+b") as file:
                file.seek(place.offset)
                file.write(value)
    layout.finish(path, spill, done)
    return layout


def check_alignment(path: Path) -> None:
    """Every entry on a multiple of its item's size, in the file and in its data; no gaps."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__")
    end = 0
    for key, entry in header.items():
        begin, after = entry["data_offsets"]
        assert begin == end, key
        end = after
        assert begin % item_size(entry["dtype"]) == 0, key
        assert (8 + size + begin) % item_size(entry["dtype"]) == 0, key
    assert 8 + size + end == len(content)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_are_those_of_flatten(fmt: QuantFormat, shape: tuple[int, ...]) -> None:
    q = qkern.quantize(torch.randn(shape, dtype=torch.bfloat16), fmt)
    expected = flat_keys.flatten(q, "a.weight")
    offset = 0.0 if q.offset is None else float(q.offset)
    pieces = weight_pieces("a.weight", shape, "bfloat16", q.format, offset)
    found = [pieces.codes, pieces.scales, *pieces.tables]
    found += [pieces.nested] if pieces.nested is not None else []
    assert {piece.key for piece in found} == set(expected)
    names = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
    for piece in found:
        entry = expected[piece.key]
        assert (names[piece.dtype], piece.shape) == (entry.dtype, tuple(entry.shape)), piece.key
        assert piece.nbytes == entry.nbytes
        if piece.content is not None:
            assert piece.content == entry.numpy().tobytes(), piece.key


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_file_of_everything_is_read_back(tmp_path: Path, fmt: QuantFormat) -> None:
    """Odd sizes of every kind, an empty tensor, and one whose scales 8 bits cannot hold."""
    rows = torch.randn(64, 512) * torch.logspace(0, -6, 64)[:, None]
    tensors: dict[str, Any] = {
        "odd": torch.randn(3).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "norm.weight": torch.randn(8).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "bias": torch.randn(5),
        "a.weight": qkern.quantize(torch.randn(64, 128).bfloat16(), fmt),
        "b.weight": qkern.quantize(torch.randn(7, 33), fmt),
        "c.weight": qkern.quantize(rows, fmt),
    }
    path = tmp_path / "model.safetensors"
    layout = write_by_layout(path, tensors, fmt)
    check_alignment(path)
    assert path.stat().st_size <= layout.most
    with safe_open(path, "pt") as opened:
        found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        assert opened.metadata() == {"format": "pt"}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, qkern.QuantizedTensor):
            expected |= flat_keys.flatten(tensor, name)
        else:
            expected[name] = tensor
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    if fmt.double_quant:
        assert not tensors["c.weight"].format.double_quant  # the case that it is about


def test_room_is_enough_for_the_longest_names_and_numbers(tmp_path: Path) -> None:
    """Names that JSON escapes, and an offset of many digits."""
    fmt = QuantFormat("nf4", 64)
    name = 'a "quoted" \N{GREEK SMALL LETTER ALPHA}\\.weight'
    tensors = {name: qkern.quantize(torch.full((8, 64), 1e-30) * torch.rand(8, 1), fmt)}
    path = tmp_path / "model.safetensors"
    write_by_layout(path, tensors, fmt)
    check_alignment(path)
    with safe_open(path, "pt") as opened:
        assert name in set(opened.keys())


def test_two_entries_of_one_key_are_refused() -> None:
    weight = Weight("a.weight", (4, 64), "float32", QuantFormat())
    for key in ("a.weight.absmax", "a.weight.nested_absmax", "a.weight"):
        with pytest.raises(qkern.CorruptFileError, match=f"key {key}"):
            ShardLayout("f", [weight, Piece(key, "F32", (1,), 4)], {})


def test_sizes_beyond_32_bits_are_placed() -> None:
    fmt = QuantFormat("nf4", 64)
    weights = [Weight(f"{i}.weight", (1 << 17, 1 << 17), "bfloat16", fmt) for i in range(3)]
    layout = ShardLayout("f", weights, {})
    offsets = [layout.places[f"{i}.weight"].offset for i in range(3)]
    assert offsets == [layout.start + i * (1 << 33) for i in range(3)]
    assert layout.body_end == layout.start + 3 * (1 << 33)
    assert layout.spill_size == 3 * 4 * math.prod(weights[0].shape) // 64


def test_a_header_that_no_reader_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LARGEST_HEADER", 1000)
    pieces = [Piece(str(i), "F32", (1,), 4) for i in range(20)]
    with pytest.raises(qkern.FormatError, match="its header would have"):
        ShardLayout("f", pieces, {})
    ShardLayout("f", pieces[:10], {})


DENSE = st.tuples(
    st.sampled_from(["F64", "F32", "BF16", "F16", "U8", "BOOL", "F8_E4M3", "I64"]),
    st.lists(st.integers(0, 7), max_size=3),
)
WEIGHTS = st.tuples(
    st.sampled_from(FORMATS), st.lists(st.integers(1, 40), min_size=2, max_size=3), st.booleans()
)


@given(st.lists(st.one_of(DENSE, WEIGHTS), max_size=12))
def test_any_mix_of_entries_is_without_gaps_and_aligned(mix: list[Any]) -> None:
    """Scales of weights hold in 8 bits or do not, by chance; their numbers play no part."""
    items: list[Piece | Weight] = []
    done = {}
    for i, (kind, shape, *holds) in enumerate(mix):
        name = f"{i}.weight"
        if isinstance(kind, QuantFormat):
            items.append(Weight(name, tuple(shape), "bfloat16", kind.for_shape(shape)))
            done[name] = Done(0, holds[0], -0.123456789, 0, 0, None)
        else:
            items.append(Piece(name, kind, tuple(shape), item_size(kind) * math.prod(shape)))
    layout = ShardLayout("f", items, {"format": "pt"})
    with tempfile.TemporaryDirectory() as folder:
        path, spill = Path(folder, "f"), Path(folder, "f.scales")
        path.write_bytes(bytes(layout.body_end))
        spill.write_bytes(bytes(layout.spill_size))
        sizes = layout.finish(path, spill, done)
        check_alignment(path)
        assert path.stat().st_size <= layout.most
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(sizes)
