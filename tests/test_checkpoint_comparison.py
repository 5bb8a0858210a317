"""``inspect_checkpoint(compare=)``: two checkpoints side by side."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import block_errors, row, strict_json, write
from torch import Tensor

import qkern
from qkern import flat_keys
from qkern.checkpoint.inspection_report import InspectionReport


def test_a_dtype_that_is_not_read_is_listed_and_not_compared(tmp_path: Path) -> None:
    header = json.dumps({"x.weight": {"dtype": "U16", "shape": [2, 4], "data_offsets": [0, 16]}})
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    report = qkern.inspect_checkpoint(file)
    assert row(report, "x.weight").reason == "U16, not floating point"
    assert row(report, "x.weight").nbytes == 16
    compared = qkern.inspect_checkpoint(file, compare=file)
    assert compared.findings() == [("x.weight", "dtype is not read: not compared")]
    assert compared.exceeding(9.9) == ("x.weight",)
    assert "no tensor has a counterpart" in str(compared)


def test_checkpoints_are_compared_by_name(tmp_path: Path) -> None:
    w = torch.randn(100, 700)
    quantized = {n: flat_keys.flatten(qkern.quantize(w, n, blocksize=b), "w.weight")
                 for n, b in (("nf4", 64), ("int8", 4096))}  # fmt: skip
    here = write(tmp_path / "here", quantized["nf4"] | {"a": w, "b": w, "ids": torch.arange(4)})
    there = write(
        tmp_path / "there",
        quantized["int8"] | {"a": w + 0.1, "b": w.T, "c": w, "ids": torch.tensor([0, 1, 2, 9])},
    )
    report = qkern.inspect_checkpoint(here, compare=there)
    assert report.comparison is not None
    assert report.comparison.only_here == ()
    assert report.comparison.only_there == ("c",)
    assert report.comparison.shapes == (("b", (100, 700), (700, 100)),)
    assert report.comparison.stored_there["w.weight"] == "int8"
    dense = [qkern.quantize(w, n, blocksize=b).dequantize().double()
             for n, b in (("nf4", 64), ("int8", 4096))]  # fmt: skip
    expected = (dense[0] - dense[1]).norm() / dense[1].norm()
    error = row(report).error
    assert error is not None
    assert error.relative_rms == pytest.approx(float(expected), rel=1e-12)
    assert error.max_abs == float((dense[0] - dense[1]).abs().max())
    blocks = block_errors(dense[0], dense[1], 64)
    assert error.worst_blocks[0].block == int(blocks.argmax())
    a = row(report, "a").error
    assert a is not None
    assert a.relative_rms == pytest.approx(float(0.1 * 70_000**0.5 / (w + 0.1).norm()), rel=1e-5)
    assert row(report, "ids").error.max_abs == 6  # type: ignore[union-attr]
    assert row(report, "b").error is None
    assert set(report.exceeding(0.15)) == {"ids", "b", "c"}
    assert "only in" in str(report)
    strict_json(report)


def test_nan_in_one_of_two_is_a_difference_and_in_both_is_none(tmp_path: Path) -> None:
    w = torch.randn(8, 8)
    w[0, 0] = math.nan
    w[0, 1] = math.inf
    other = w.clone()
    same, spoilt = {"w": w, "z": torch.zeros(3)}, {"w": other, "z": torch.ones(3)}
    assert row(compare(tmp_path / "1", same, same), "w").error.relative_rms == 0  # type: ignore[union-attr]
    other[0, 1] = 1.0
    report = compare(tmp_path / "2", spoilt, same)
    error = row(report, "w").error
    assert error is not None
    assert (error.unlike_nonfinite, error.relative_rms) == (1, math.inf)
    assert ("w", "1 values are NaN or infinite in one of the two only") in report.findings()
    assert row(report, "z").error.relative_rms == math.inf  # type: ignore[union-attr]
    content = strict_json(report)
    assert content["relative_rms"] is None
    assert {t["error"]["relative_rms"] for t in content["tensors"]} == {None}


def test_blocks_of_two_formats_need_not_meet(tmp_path: Path) -> None:
    w = torch.randn(900, 173)  # odd rows: neither pieces nor 4-bit bytes end with them
    formats = ("int8_row", "nf4", "int8")
    dense = {name: qkern.quantize(w, name).dequantize() for name in formats}
    paths = {
        name: write(tmp_path / name, flat_keys.flatten(qkern.quantize(w, name), "w.weight"))
        for name in formats
    } | {"dense": write(tmp_path / "dense", {"w.weight": w})}
    for here, there, blocksize in (
        ("int8_row", "nf4", 173), ("nf4", "int8_row", 64), ("int8", "int8_row", 64),
        ("dense", "int8_row", 173),
    ):  # fmt: skip
        report = qkern.inspect_checkpoint(paths[here], compare=paths[there])
        error = row(report).error
        assert error is not None
        assert (error.blocksize, error.per_row) == (blocksize, blocksize == 173)
        expected = block_errors(dense.get(here, w), dense[there], blocksize)
        assert error.worst_blocks[0].block == int(expected.argmax())
        assert error.worst_blocks[0].relative_rms == pytest.approx(float(expected.max()), rel=1e-9)
        assert report.quantized_relative_rms == report.relative_rms
        assert "over the 1 quantized tensors" in str(report)


def compare(path: Path, here: dict[str, Tensor], there: dict[str, Tensor]) -> InspectionReport:
    return qkern.inspect_checkpoint(write(path / "a", here), compare=write(path / "b", there))


def test_nothing_is_written_into_a_file_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"w.weight": torch.randn(64, 64, dtype=torch.float64)})
    before = (path / "model.safetensors").read_bytes()
    qkern.inspect_checkpoint(path, compare=path)
    assert (path / "model.safetensors").read_bytes() == before


# -- transposes ------------------------------------------------------------------------------

# Conv1D's (in, out): one that widens, a square one, one that narrows.
CONV1D = {"h.0.attn.c_attn": (64, 192), "h.0.attn.c_proj": (64, 64), "h.0.mlp.c_proj": (256, 64)}


def write_gpt2(path: Path, tensors: dict[str, Tensor]) -> Path:
    write(path, tensors)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return path


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
@pytest.mark.parametrize("names", [[*CONV1D], ["h.0.attn.c_proj"]])
def test_a_conv1d_is_compared_with_its_transpose(
    quant_type: str, names: list[str], tmp_path: Path
) -> None:
    dense = {f"{name}.weight": torch.randn(*CONV1D[name]) for name in names}
    src = write_gpt2(tmp_path / "dense", dense)
    qkern.quantize_checkpoint(src, tmp_path / "q", quant_type)
    for here, there in (("q", "dense"), ("dense", "q")):
        report = qkern.inspect_checkpoint(tmp_path / here, compare=tmp_path / there)
        assert report.findings() == []
        assert report.comparison is not None
        assert set(report.comparison.transposed) == set(dense)
        assert f"{len(dense)} tensors are transposed in one of the two" in str(report)
        for name, w in dense.items():
            linear = w.T.contiguous()
            found = qkern.quantize(linear, quant_type)
            pair = (found.dequantize(), linear)
            got, expected = pair if here == "q" else pair[::-1]
            error = row(report, name).error
            assert error is not None
            exact = float((got - expected).double().norm() / expected.double().norm())
            assert error.relative_rms == pytest.approx(exact, rel=1e-6)
            assert error.relative_rms < 0.12
            blocks = block_errors(got, expected, found.format.blocksize)
            assert error.worst_blocks[0].block == int(blocks.argmax())
        strict_json(report)


def test_conv1d_weights_that_are_not_transposed_are_compared_as_they_are(tmp_path: Path) -> None:
    dense = {f"{name}.weight": torch.randn(*shape) for name, shape in CONV1D.items()}
    plain: dict[str, Tensor] = {}
    for name, w in dense.items():
        plain |= flat_keys.flatten(qkern.quantize(w), name)
    src = write_gpt2(tmp_path / "dense", dense)
    other = write_gpt2(tmp_path / "plain", plain)
    qkern.quantize_checkpoint(src, tmp_path / "q")
    qkern.quantize_checkpoint(src, tmp_path / "some", exclude=["c_attn"])
    for here, there, count in (
        (other, src, 0), (src, src, 0), (tmp_path / "q", tmp_path / "q", 0),
        (tmp_path / "q", other, 3), (other, tmp_path / "q", 3), (tmp_path / "some", src, 2),
    ):  # fmt: skip
        report = qkern.inspect_checkpoint(here, compare=there)
        assert report.comparison is not None
        assert len(report.comparison.transposed) == count
        assert report.exceeding(0.15) == ()
        assert not report.findings()


def test_stacked_mxfp4_is_compared_with_what_the_class_holds(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    src = write(
        tmp_path / "src",
        {
            f"{name}_blocks": torch.randint(0, 256, (2, 64, 2, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(110, 140, (2, 64, 2), dtype=torch.uint8),
        },
    )
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (src / "config.json").write_text(json.dumps(config))
    qkern.convert_checkpoint(src, tmp_path / "codes", "qkern")
    qkern.convert_checkpoint(src, tmp_path / "dense", "float32")
    report = qkern.inspect_checkpoint(tmp_path / "codes", compare=tmp_path / "dense")
    assert row(report, name).error is not None
    assert row(report, name).error.max_abs == 0  # type: ignore[union-attr]
    assert report.exceeding(0) == ()
