"""The pictures of an inspection: files that parse, names that can be read."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qkern
from qkern.checkpoint.charts import check_chart_path, write_error_chart, write_histogram
from qkern.checkpoint.inspection_report import InspectionReport

SVG = "{http://www.w3.org/2000/svg}"


def inspect(path: Path, names: list[str], **settings: Any) -> InspectionReport:
    tensors = {name: torch.randn(4, 64) for name in names}
    tensors[names[-1]][:, 3] = 9.0  # the worst
    save_file(tensors, path / "model.safetensors")
    return qkern.inspect_checkpoint(path, histogram=True, **settings)


def layers(count: int) -> list[str]:
    return [f"model.layers.{i // 4}.{'qkvo'[i % 4]}_proj.weight" for i in range(count)]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def texts(path: Path) -> list[str]:
    root = ET.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("count", [1, 3, 300])
def test_charts_work_for_any_number_of_tensors(count: int, tmp_path: Path) -> None:
    names = layers(count)
    report = inspect(tmp_path, names)
    width, height = png_size(write_error_chart(report, tmp_path / "a.png"))
    assert 600 < width < 2000
    assert 150 < height < 2000
    found = texts(write_error_chart(report, tmp_path / "a.svg"))
    assert any(text.startswith(f"Error per layer: {tmp_path.name} as nf4") for text in found)
    assert "relative RMS error, ||w - w'|| / ||w||" in found
    worst = report.worst[0]
    assert worst.error is not None
    assert any(worst.name.removesuffix(".weight") in text for text in found)
    assert any(f"{worst.error.relative_rms:.4g}" in text for text in found)
    if count == 300:
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "layer", "40"} <= set(found)


def test_the_histogram_has_axes_and_codes(tmp_path: Path) -> None:
    report = inspect(tmp_path, layers(3))
    assert min(png_size(write_histogram(report, tmp_path / "h.png"))) > 300
    found = texts(write_histogram(report, tmp_path / "h.svg"))
    assert {"weight / RMS of its tensor", "share of the weights (%)", "-0.696"} <= set(found)
    assert any(text.startswith("768 weights, ") for text in found)
    title = f"Weights of {tmp_path.name}, codes as nf4 in blocks of 64 with 8-bit scales, method"
    assert f"{title} absmax" in found
    rows = inspect(tmp_path, layers(3), quant_type="int8_row")
    found = texts(write_histogram(rows, tmp_path / "h.svg"))
    assert {"share of the weights (%)", "code, in units of its row's scale / 127"} <= set(found)


@pytest.mark.parametrize(
    "names",
    [
        [f"{a}_{b}.weight" for a in "abcdef" for b in "uvwxyz"],
        ["pooler.weight", *(f"layer.{i}.experts.{e}.weight" for i in range(4) for e in range(9))],
        ["_orig_mod.a$b$.weight", "x_{.weight", "ein sehr " + "langer Name " * 30 + ".weight"],
        [f"_orig.{i}.\u5c42.weight" for i in range(40)],
    ],
)  # fmt: skip
def test_odd_names_are_drawn(names: list[str], tmp_path: Path) -> None:
    report = inspect(tmp_path, names)
    assert len(report.worst) == len(names)
    png_size(write_error_chart(report, tmp_path / "a.png"))
    texts(write_error_chart(report, tmp_path / "a.svg"))


def test_a_comparison_leaves_out_what_is_equal(tmp_path: Path) -> None:
    names = layers(8)
    inspect(tmp_path, names)
    other = {name: torch.randn(4, 64) for name in names[:2]}
    (tmp_path / "other").mkdir()
    save_file({name: torch.zeros(4, 64) for name in names[:1]} | {names[1]: other[names[1]]},
              tmp_path / "other" / "model.safetensors")  # fmt: skip
    report = qkern.inspect_checkpoint(tmp_path, compare=tmp_path / "other")
    found = texts(write_error_chart(report, tmp_path / "a.svg"))
    assert "not finite" in found  # relative to zeros
    same = qkern.inspect_checkpoint(tmp_path, compare=tmp_path)
    png_size(write_error_chart(same, tmp_path / "same.png"))


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    report = inspect(tmp_path, layers(40))
    for suffix in ("png", "svg"):
        files = [write_error_chart(report, tmp_path / f"{i}.{suffix}") for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    report = inspect(tmp_path, ["a.weight"], exclude=["a"])
    with pytest.raises(qkern.FormatError, match="no tensor has an error"):
        write_error_chart(report, tmp_path / "a.png")
    plain = qkern.inspect_checkpoint(tmp_path)
    with pytest.raises(qkern.FormatError, match="no tensor counts as a linear layer's weight"):
        write_histogram(report, tmp_path / "a.png")
    with pytest.raises(qkern.FormatError, match="histogram=True"):
        write_histogram(plain, tmp_path / "a.png")
    with pytest.raises(qkern.FormatError, match=r"\.png or \.svg"):
        check_chart_path("a.jpeg")
    (tmp_path / "d.svg").mkdir()
    with pytest.raises(IsADirectoryError):
        check_chart_path(tmp_path / "d.svg")
    assert not (tmp_path / "a.png").exists()
