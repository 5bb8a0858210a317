"""``qkern inspect``: what it prints, draws and refuses, and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli_doctor import run_without

import qkern
from qkern import flat_keys
from qkern.checkpoint.inspection_report import InspectionReport
from qkern.cli import exit_codes, main, terminal

LAYERS = [f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in ("q_proj", "up_proj")]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A directory of six linear weights; the fifth has the largest error, by one outlier a row."""
    tensors = {name: torch.randn(64, 64) for name in LAYERS} | {"model.norm.weight": torch.ones(8)}
    tensors[LAYERS[4]][:, 5] = 20.0
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    return tmp_path / "dense"


@pytest.fixture
def stored(dense: Path) -> Path:
    """The same, quantized."""
    tensors = load_file(dense / "model.safetensors")
    for name in LAYERS:
        tensors |= flat_keys.flatten(qkern.quantize(tensors[name]), name)
    directory = dense.parent / "stored"
    directory.mkdir()
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(copies, directory / "model.safetensors")
    return directory


def call(*arguments: object) -> int:
    return main(["inspect", *(str(argument) for argument in arguments)])


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_the_text_shows_the_worst_first(dense: Path, capsys: Any) -> None:
    assert call(dense, "--top", "2") == exit_codes.DONE
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{dense}: 7 tensors, 24,584 values, 96.0 KiB"
    assert lines[1] == "as nf4 in blocks of 64 with 8-bit scales, method absmax"
    assert lines[3] == "tensors (2 worst of 6, by rel rms)"
    assert lines[6].startswith(LAYERS[4])
    assert lines[8].startswith("rel rms is ||w - w'|| / ||w||")
    assert lines[10:12] == ["", "worst blocks"]
    assert lines[14].startswith(LAYERS[4])
    assert "1-D, a linear layer's weight is 2-D" in out
    assert "6 of 7 weights quantized" in out
    assert re.match(r"relative rms error 0\.\d+ over the 6 quantized tensors; ", lines[-1])
    assert "4.141 bits per quantized weight" in lines[-1]


def test_settings_reach_the_codec(dense: Path, capsys: Any) -> None:
    arguments = ["--format", "int8", "--blocksize", "128", "--no-double-quant", "--json"]
    arguments += ["--exclude", "q_proj", "--include", "norm", "--outliers", "3", "--top", "1"]
    assert call(dense, *arguments) == exit_codes.DONE
    report = strict(capsys.readouterr().out)
    assert report["format"] == {"quant_type": "int8", "blocksize": 128, "double_quant": False}
    assert (report["method"], report["outlier_rms"]) == ("absmax", 3.0)
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert tensors[LAYERS[0]]["reason"] == "excluded by 'q_proj'"
    assert tensors["model.norm.weight"]["format"]["quant_type"] == "int8"
    assert tensors[LAYERS[1]]["bits_per_weight"] == 8.25
    assert len(report["worst"]) == 1


def test_int8_rows_are_shown_by_rows(dense: Path, capsys: Any) -> None:
    assert call(dense, "--format", "int8_row", "--top", "1") == exit_codes.DONE
    out = capsys.readouterr().out
    assert "as int8_row with an fp32 scale a row, method absmax\n" in out
    assert "\nworst rows\n" in out
    assert re.search(r"q_proj.weight +\d+ +64 +\[\d+, 0\] +0\.0", out)
    assert "8.500 bits per quantized weight" in out
    tensors = load_file(dense / "model.safetensors")
    for name in LAYERS:
        tensors |= flat_keys.flatten(qkern.quantize(tensors[name], "int8_row"), name)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, dense / "model.safetensors")
    assert call(dense) == exit_codes.DONE
    out = capsys.readouterr().out
    assert "tensors (all 6, worst first, by code bits)" in out
    assert "6 of 7 weights quantized" in out
    assert "ratio in 256" not in out


def test_json_is_all_that_is_on_stdout_and_strict(dense: Path, capsys: Any) -> None:
    tensors = {"a.weight": torch.tensor([[float("nan"), 1.0]]), "b": torch.tensor(float("inf"))}
    save_file(tensors, dense / "model.safetensors")
    assert call(dense, "--json", "--histogram", dense / "h.svg") == exit_codes.DONE
    report = strict(capsys.readouterr().out)
    assert [finding["tensor"] for finding in report["findings"]] == ["a.weight", "b"]
    assert report["relative_rms"] is None
    assert len(report["histogram"]["counts"]) + 1 == len(report["histogram"]["edges"])


def test_search_is_tried_with_less_error(dense: Path, capsys: Any) -> None:
    assert "absmax, or search" in " ".join(help_text(capsys).split())
    errors = []
    for method in ("absmax", "search"):
        assert call(dense, "--method", method, "--json") == exit_codes.DONE
        report = strict(capsys.readouterr().out)
        assert report["method"] == method
        errors.append(report["quantized_relative_rms"])
    assert errors[1] < 0.97 * errors[0]  # outliers leave less to gain
    w = load_file(dense / "model.safetensors")[LAYERS[0]]
    q = qkern.quantize(w, method="search")
    expected = (q.dequantize().double() - w.double()).norm() / w.double().norm()
    error = next(t["error"] for t in report["tensors"] if t["name"] == LAYERS[0])
    assert error["relative_rms"] == pytest.approx(float(expected), rel=1e-12)


def help_text(capsys: Any) -> str:
    assert call("--help") == exit_codes.DONE
    text: str = capsys.readouterr().out
    return text


def test_a_quantized_checkpoint_shows_its_scales(stored: Path, capsys: Any) -> None:
    assert call(stored) == exit_codes.DONE
    out = capsys.readouterr().out
    assert "ratio in 256" in out
    assert "nf4/64" in out
    assert "worst blocks" not in out
    assert call(stored, "--json") == exit_codes.DONE
    report = strict(capsys.readouterr().out)
    assert (report["kind"], report["format"]) == ("quantized", None)
    assert all(t["scales"]["blocks"] == 64 for t in report["tensors"] if t["scales"])


def test_compare_and_max_error(stored: Path, dense: Path, capsys: Any) -> None:
    assert call(stored, "--compare", dense, "--max-error", "0.5") == exit_codes.DONE
    out = capsys.readouterr().out
    assert f"compared with {dense}, which errors are relative to" in out
    assert re.search(r"64x64 +nf4 +float32 +0\.1", out)
    assert call(stored, "--compare", dense, "--max-error", "0.092", "--json") == exit_codes.NO
    out, err = capsys.readouterr()
    report = strict(out)
    errors = {t["name"]: t["error"]["relative_rms"] for t in report["tensors"]}
    assert report["exceeding"] == [name for name, error in errors.items() if error > 0.092]
    assert LAYERS[4] in report["exceeding"]
    assert "above --max-error 0.092" in err
    assert call(dense, "--compare", dense, "--max-error", "0") == exit_codes.DONE
    save_file({"other": torch.ones(1)}, stored / "model.safetensors")
    assert call(dense, "--compare", stored, "--max-error", "9") == exit_codes.NO
    assert call(dense, "--max-error", "0.05") == exit_codes.NO


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_charts_are_written_where_asked(dense: Path, suffix: str, capsys: Any) -> None:
    files = [dense.parent / "new" / f"{name}.{suffix}" for name in ("chart", "histogram")]
    assert call(dense, "--chart", files[0], "--histogram", files[1]) == exit_codes.DONE
    out, err = capsys.readouterr()
    assert err == f"wrote {files[0]}\nwrote {files[1]}\n"
    assert "wrote" not in out
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--chart", "a.pdf"], exit_codes.USAGE, "a.pdf: a chart is written as .png or .svg"),
        (["--chart", "x.png", "--histogram", "./x.png"], exit_codes.USAGE, "a file of its own"),
        (["--method", "guess"], exit_codes.USAGE, "unknown method 'guess': allowed are 'absmax'"),
        (
            ["--method", "search", "--format", "int8"],
            exit_codes.USAGE,
            "is for 4-bit formats: int8",
        ),
        (["--method", "search", "--format", "int8_row"], exit_codes.USAGE, "4-bit formats: int8_r"),
        (["--format", "zz9"], exit_codes.USAGE, "invalid choice: 'zz9'"),
        (["--top", "-1"], exit_codes.USAGE, "-1 is not 0 or more"),
        (["--max-error", "nan"], exit_codes.USAGE, "nan is not 0 or more"),
        (["--outliers", "0"], exit_codes.USAGE, "outlier_rms is 0.0"),
        (["--exclude", "nothing"], exit_codes.USAGE, "'nothing' matches no dense tensor"),
        (["--compare", "/none"], exit_codes.IO, "there is no /none"),
    ],
)
def test_what_is_refused(
    arguments: list[str], code: int, text: str, dense: Path, capsys: Any
) -> None:
    assert call(dense, *arguments) == code
    assert text in capsys.readouterr().err


def test_two_checkpoints_with_no_tensor_in_common_are_no_comparison(
    dense: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"h.0.attn": torch.ones(1)}, other)
    assert call(dense, "--compare", other) == exit_codes.NO
    err = capsys.readouterr().err
    assert "not one tensor could be compared" in err
    assert LAYERS[0] in err
    assert f"{other} has h.0.attn: are both" in err
    save_file({"h.0.attn": torch.ones(2)}, tmp_path / "shape.safetensors")
    assert call(other, "--compare", tmp_path / "shape.safetensors", "--json") == exit_codes.NO
    out, err = capsys.readouterr()
    assert strict(out)["comparison"]["shapes"]
    assert "shapes differ" in err


@pytest.mark.parametrize("option", [["--chart", "x.png"], ["--max-error", "0.1"]])
def test_a_quantized_checkpoint_alone_has_no_errors(
    option: list[str], stored: Path, capsys: Any
) -> None:
    assert call(stored, *option) == exit_codes.USAGE
    assert "need --compare with the dense original" in capsys.readouterr().err


def test_files_that_are_missing_or_spoilt(dense: Path, capsys: Any) -> None:
    assert call(dense.parent / "none", "--json") == exit_codes.IO
    out, err = capsys.readouterr()
    assert strict(out)["error"]["type"] == "FileNotFoundError"
    assert err.count("\n") == 1
    assert call(dense, "--chart", dense / "model.safetensors") == exit_codes.USAGE
    (dense / "chart.png").mkdir()
    assert call(dense, "--chart", dense / "chart.png") == exit_codes.IO
    (dense / "model.safetensors").write_bytes(b"junk")
    assert call(dense) == exit_codes.BAD_INPUT
    assert "model.safetensors: not a readable safetensors file" in capsys.readouterr().err


def test_a_reader_that_goes_away_sees_no_traceback(dense: Path) -> None:
    command = [sys.executable, "-m", "qkern", "inspect", str(dense), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == exit_codes.IO


def test_packages_that_are_missing_are_named(dense: Path) -> None:
    done = run_without({"torch"}, "inspect", str(dense))
    assert done.returncode == exit_codes.IO
    assert done.stderr.count("\n") == 1
    assert 'needs torch, not installed here: pip install "qkern[torch]"' in done.stderr
    done = run_without({"matplotlib", "tqdm"}, "inspect", str(dense), "--chart", "x.png")
    assert done.returncode == exit_codes.IO
    assert 'charts need matplotlib, not installed here: pip install "qkern[inspect]"' in done.stderr


def test_an_interrupt_ends_with_130(dense: Path, monkeypatch: Any, capsys: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> InspectionReport:
        raise KeyboardInterrupt

    monkeypatch.setattr("qkern.inspect_checkpoint", interrupt)
    assert call(dense) == exit_codes.INTERRUPTED
    assert capsys.readouterr().err == "qkern inspect: interrupted\n"


def test_progress_is_shown_on_a_terminal_only(monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.byte_progress("inspecting") as advance:
            assert (advance is None) == (not stream.isatty())
            if advance is not None:
                advance(512, 1024)
                advance(512, 1024)
        assert ("inspecting" in stream.getvalue()) == stream.isatty()
