"""``inspect_checkpoint`` against plain torch: errors, values, scales, coverage, comparisons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import block_errors, row, strict_json, write, write_shards
from torch import Tensor

import qkern
from qkern import flat_keys
from qkern.checkpoint.measure import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    PIECE,
    Values,
    measure_error,
)
from qkern.formats import NF4

# More than one piece, and a ragged last block; less than a block; rows that share blocks.
SHAPES = [(300, 257), (3, 5), (9, 96)]
FORMATS = [("nf4", 64, True), ("nf4", 4096, False), ("fp4", 32, True), ("int8", 128, False)]
FORMATS += [("int8_row", 64, False)]


@pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_plain_torch(
    quant_type: str, blocksize: int, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype,
    tmp_path: Path,
) -> None:  # fmt: skip
    w = (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(dtype)
    settings: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant}
    q = qkern.quantize(w, quant_type, **settings)
    got = row(qkern.inspect_checkpoint(write(tmp_path, {"w.weight": w}), quant_type, **settings))
    dense = q.dequantize(torch.float32).double()
    assert got.error is not None
    expected = (dense - w.double()).norm() / w.double().norm()
    assert got.error.relative_rms == pytest.approx(float(expected), rel=1e-12)
    assert got.error.max_abs == float((dense - w.double()).abs().max())
    assert got.format == q.format
    assert got.bits_per_weight == 8 * q.nbytes / w.numel()
    blocksize = shape[1] if quant_type == "int8_row" else blocksize
    assert got.error.blocksize == blocksize
    errors = block_errors(dense, w, blocksize)
    worst = errors.argsort(descending=True)[:5].tolist()
    assert [block.block for block in got.error.worst_blocks] == worst
    for block in got.error.worst_blocks:
        flat = w.float().reshape(-1)[block.block * blocksize :][:blocksize]
        assert block.relative_rms == pytest.approx(float(errors[block.block]), rel=1e-12)
        assert block.absmax == float(flat.abs().max())
        assert float(w[block.start]) == float(flat[0])


def test_values_are_those_of_plain_torch(tmp_path: Path) -> None:
    w = torch.randn(300, 257)
    w[0, :3] = torch.tensor([20.0, -30.0, 7.0])
    norm = 1 + 0.01 * torch.randn(70_000)
    report = qkern.inspect_checkpoint(
        write(tmp_path, {"w.weight": w, "norm.weight": norm}), outlier_rms=5.0, histogram=True
    )
    for name, tensor in (("w.weight", w), ("norm.weight", norm)):
        x, found = tensor.double().reshape(-1), row(report, name).values
        assert found is not None
        rms, d = x.square().mean().sqrt(), x - x.mean()
        assert found.rms == pytest.approx(float(rms), rel=1e-12)
        assert found.max_abs == float(x.abs().max())
        kurtosis = d.pow(4).mean() / d.square().mean() ** 2
        assert found.kurtosis == pytest.approx(float(kurtosis), rel=1e-9)
        assert found.crest_factor == pytest.approx(float(x.abs().max() / rms))
        assert found.outliers == int((x.abs() > 5 * rms).sum())
    assert row(report).values.outliers == 3  # type: ignore[union-attr]
    scaled = (w.double() / w.double().square().mean().sqrt()).reshape(-1)
    inside = torch.histc(scaled, HISTOGRAM_BINS, -HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
    assert report.histogram == (1, *inside.long().tolist(), 1)  # of the linear weight alone
    assert len(report.histogram_edges) == HISTOGRAM_BINS + 1


def test_values_are_read_in_pieces() -> None:
    w = torch.randn(PIECE + 1000)
    for tensor in (w, qkern.quantize(w, blocksize=4096)):
        pieces = list(Values(tensor).pieces())
        assert [(first, piece.numel()) for first, piece in pieces] == [(0, PIECE), (PIECE, 1000)]
        dense = w if tensor is w else tensor.dequantize()
        assert torch.equal(torch.cat([piece for _, piece in pieces]), dense.double())


@pytest.mark.parametrize("shape", [(7, 33), (2, PIECE + 1001)])
@pytest.mark.parametrize("quant_type", ["nf4", "int8", "int8_row"])
def test_values_are_read_from_anywhere(quant_type: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    q = qkern.quantize(w, quant_type, blocksize=32, double_quant=False)
    values, dense, n = Values(q), q.dequantize().double().reshape(-1), w.numel()
    for first, last in ((0, n), (1, n), (31, 33), (33, 66), (40, 40), (n - 35, n - 1), (67, 101)):
        assert torch.equal(values.read(first, last), dense[first:last])
    error = measure_error(values, Values(w), blocks_of=q.format)
    expected = block_errors(q.dequantize(), w, q.format.blocksize)
    assert error.worst_blocks[0].block == int(expected.argmax())
    assert error.worst_blocks[0].relative_rms == pytest.approx(float(expected.max()), rel=1e-12)


def test_scales_and_codes_are_counted(tmp_path: Path) -> None:
    w = torch.randn(9, 105)  # odd: the last low nibble is padding
    w.view(-1)[64:128] = 0
    w.view(-1)[128:192] *= 1e-2
    q = qkern.quantize(w, "nf4", double_quant=False)
    entries = {key: entry.clone() for key, entry in flat_keys.flatten(q, "w.weight").items()}
    scales = row(qkern.inspect_checkpoint(write(tmp_path / "a", entries))).scales
    assert scales is not None
    sizes = q.absmax.reshape(-1)
    assert (scales.blocks, scales.zero, scales.negative, scales.nonfinite) == (15, 1, 0, 0)
    assert (scales.min_abs, scales.max_abs) == (float(sizes[sizes > 0].min()), float(sizes.max()))
    assert scales.group_ratio == pytest.approx(float(sizes.max() / sizes[sizes > 0].min()))
    codes = [v // 16 for v in q.packed.tolist()], [v % 16 for v in q.packed.tolist()]
    nibbles = [code for pair in zip(*codes, strict=True) for code in pair][: w.numel()]
    counts = [nibbles.count(code) for code in range(16)]
    assert scales.code_counts == tuple(counts)
    shares = [count / len(nibbles) for count in counts if count]
    assert scales.code_entropy == pytest.approx(-sum(p * math.log2(p) for p in shares))
    entries["w.weight.absmax"][:3] = torch.tensor([math.nan, -1.0, math.inf])
    report = qkern.inspect_checkpoint(write(tmp_path / "b", entries))
    scales = row(report).scales
    assert scales is not None
    assert (scales.zero, scales.negative, scales.nonfinite) == (0, 1, 2)
    texts = [text for _, text in report.findings()]
    assert any("2 of 15 scales are NaN or infinite" in text for text in texts)
    strict_json(report)


def test_the_ratio_of_scales_is_taken_within_groups_of_256(tmp_path: Path) -> None:
    sizes = torch.ones(512)
    sizes[:256] = 1000.0
    sizes[300] = 4.0
    report = qkern.inspect_checkpoint(
        write(tmp_path, {"w.weight": sizes[:, None] * torch.ones(512, 64)}), double_quant=False
    )
    scales = row(report).scales
    assert scales is not None
    assert scales.group_ratio == 4.0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
def test_a_stored_tensor_has_the_error_of_the_trial(quant_type: str, tmp_path: Path) -> None:
    w = torch.randn(40, 64).bfloat16()
    dense = write(tmp_path / "dense", {"w.weight": w})
    q = qkern.quantize(w, quant_type)
    stored = write(tmp_path / "stored", flat_keys.flatten(q, "w.weight"))
    (stored / "config.json").write_text('{"dtype": "bfloat16"}')
    trial = row(qkern.inspect_checkpoint(dense, quant_type))
    alone = qkern.inspect_checkpoint(stored)
    assert alone.is_quantized
    assert row(alone).error is None
    assert (row(alone).shape, row(alone).dtype) == ((40, 64), "bfloat16")
    assert (row(alone).format, row(alone).nbytes) == (q.format, q.nbytes)
    assert row(alone).scales == trial.scales
    assert row(qkern.inspect_checkpoint(stored, compare=dense)).error == trial.error


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [False, True])
def test_what_bitsandbytes_writes_is_read(quant_type: str, compress: bool, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.randn(64, 128)
    packed, state = quantize_4bit(w, quant_type=quant_type, compress_statistics=compress)
    theirs = dequantize_4bit(packed, state).double()
    parts = {f"w.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    stored = write(tmp_path / "stored", {"w.weight": packed} | parts)
    dense = write(tmp_path / "dense", {"w.weight": w})
    got = row(qkern.inspect_checkpoint(stored, compare=dense))
    assert got.format == qkern.QuantFormat(quant_type, 64, compress)
    assert got.error is not None
    expected = float((theirs - w.double()).norm() / w.double().norm())
    assert got.error.relative_rms == pytest.approx(expected, rel=1e-9)


def test_scales_that_double_quantization_has_spoilt_are_found(tmp_path: Path) -> None:
    """What bitsandbytes makes of rows that are much smaller than others."""
    from bitsandbytes.functional import quantize_4bit

    w = torch.randn(512, 256)
    w[1::2] *= 1e-3
    packed, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    parts = {f"w.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    report = qkern.inspect_checkpoint(write(tmp_path, {"w.weight": packed} | parts))
    scales = row(report).scales
    assert scales is not None
    assert scales.negative == scales.turned > 0
    text = f"{scales.turned} of 2048 scales have another sign"
    assert [name for name, found in report.findings() if found.startswith(text)] == ["w.weight"]
    ours = flat_keys.flatten(qkern.quantize(w), "w.weight")
    assert qkern.inspect_checkpoint(write(tmp_path, ours)).findings() == []


def test_a_negative_scale_of_int8_is_told(tmp_path: Path) -> None:
    entries = flat_keys.flatten(qkern.quantize(torch.randn(4, 64), "int8_row"), "w.weight")
    entries["w.SCB"] = entries["w.SCB"] * torch.tensor([1.0, -1.0, 1.0, 1.0])
    entries |= flat_keys.flatten(qkern.quantize(torch.randn(4, 64)), "v.weight")
    report = qkern.inspect_checkpoint(write(tmp_path, entries))
    text = "1 of 4 scales are negative, which no maximum is"
    assert report.findings() == [("w.weight", text)]


def test_scales_that_8_bits_cannot_hold_are_told(tmp_path: Path) -> None:
    small = torch.randn(256, 64)
    small[1::2] *= 1e-3
    tensors = {"a.weight": small, "b.weight": torch.randn(256, 64)}
    report = qkern.inspect_checkpoint(write(tmp_path / "dense", tensors))
    assert row(report, "a.weight").format == qkern.QuantFormat("nf4", 64, double_quant=False)
    assert row(report, "a.weight").bits_per_weight == 4.5
    assert report.findings() == [("a.weight", "fp32 scales: 8 bits cannot hold them")]
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored |= flat_keys.flatten(qkern.quantize(tensor), name)
    report = qkern.inspect_checkpoint(write(tmp_path / "stored", stored))
    assert report.findings() == [("a.weight", "fp32 scales, others have 8-bit ones")]


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_shards_and_single_files_give_the_same(quant_type: str, tmp_path: Path) -> None:
    tensors = {f"l.{i}.weight": torch.randn(8, 64) for i in (0, 2, 10)}
    q = flat_keys.flatten(qkern.quantize(torch.randn(8, 64), quant_type), "l.1.weight")
    apart = {"l.1.weight": q.pop("l.1.weight")}  # codes in one shard, scales in the other
    shards = write_shards(tmp_path / "shards", tensors | apart, q)
    single = write(tmp_path / "single.safetensors", tensors | apart | q)
    expected, got = (qkern.inspect_checkpoint(path) for path in (single, shards))
    assert [r.name for r in got.tensors] == [f"l.{i}.weight" for i in (0, 1, 2, 10)]
    assert [r.as_dict() | {"file": ""} for r in got.tensors] == [
        r.as_dict() | {"file": ""} for r in expected.tensors
    ]
    assert {r.file for r in got.tensors} == {"model-0.safetensors"}
    assert row(got, "l.0.weight").reason == "left dense in the file"


def test_nan_and_infinity_are_findings(tmp_path: Path) -> None:
    w = torch.randn(70, 1000)
    w[66, 7] = math.nan
    w[69, 0] = -math.inf
    norm = torch.tensor([1.0, math.nan])
    report = qkern.inspect_checkpoint(
        write(tmp_path, {"w.weight": w, "norm.weight": norm, "b.weight": torch.randn(4, 4)})
    )
    found = dict(report.findings())
    assert found["w.weight"] == "2 values are NaN or infinite, the first at [66, 7]"
    assert found["norm.weight"] == "1 values are NaN or infinite, the first at [1]"
    got = row(report)
    assert got.format is None
    assert "quantizing refuses them" in got.reason
    assert got.values is not None
    finite = w[w.isfinite()].double()
    assert got.values.rms == pytest.approx(float(finite.square().mean().sqrt()), rel=1e-12)
    assert report.exceeding(1.0) == ("norm.weight", "w.weight")
    assert "2 values are NaN" in str(report)
    strict_json(report)


def test_odd_tensors_are_listed(tmp_path: Path) -> None:
    tensors = {
        "empty.weight": torch.empty(0, 64),
        "scalar": torch.tensor(3.0),
        "one.weight": torch.ones(1, 1),
        "zeros.weight": torch.zeros(8, 64),
        "ids": torch.arange(6),
        "mask": torch.ones(2, 2) > 0,
        "double.weight": torch.randn(4, 4, dtype=torch.float64),
        "eight.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    path = write(tmp_path, tensors)
    report = qkern.inspect_checkpoint(path, histogram=True)
    reasons = {r.name: r.reason for r in report.tensors}
    assert reasons["empty.weight"] == "no values"
    assert reasons["ids"] == "int64, not floating point"
    assert reasons["mask"] == "bool, not floating point"
    assert reasons["double.weight"] == "float64, not one of float32, float16, bfloat16"
    assert reasons["eight.weight"].startswith("float8_e4m3fn, not one of")
    assert row(report, "zeros.weight").error.relative_rms == 0.0  # type: ignore[union-attr]
    assert row(report, "zeros.weight").values.kurtosis is None  # type: ignore[union-attr]
    assert row(report, "empty.weight").bits_per_weight is None
    assert row(report, "scalar").values.rms == 3.0  # type: ignore[union-attr]
    strict_json(report)
    str(report)
    same = qkern.inspect_checkpoint(path, compare=path)
    assert [r.name for r in same.tensors if r.error is None] == []
    assert same.exceeding(0.0) == ()
    strict_json(same)


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": torch.randn(4, 8), "b": torch.randn(8).half()})
    told: list[tuple[int, int]] = []
    qkern.inspect_checkpoint(path, progress=lambda done, total: told.append((done, total)))
    assert told == [(128, 144), (16, 144)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": "search", "quant_type": "int8"}, 'method "search" is for 4-bit formats: int8'),
        ({"method": "search", "quant_type": "int8_row"}, "4-bit formats: int8_row is"),
        ({"quant_type": "zz9"}, "unknown quant_type"),
        ({"blocksize": 0}, "blocksize 0"),
        ({"outlier_rms": 0.0}, "outlier_rms is 0.0"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(qkern.FormatError, match=text):
        qkern.inspect_checkpoint(write(tmp_path, {"a": torch.ones(1)}), **settings)


def test_the_codes_of_a_constant_are_those_of_the_table(tmp_path: Path) -> None:
    got = row(qkern.inspect_checkpoint(write(tmp_path, {"w.weight": torch.ones(8, 64)})))
    assert got.scales is not None
    assert got.scales.code_counts[NF4.index(1.0)] == 512
    assert (got.scales.code_entropy, got.scales.group_ratio) == (0.0, 1.0)
