"""``qkern convert`` and ``qkern merge``: what they print, refuse, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from file_trees import tree
from peft_adapters import model, tensors_of, write_adapter, write_base
from test_cli_doctor import run_without

import qkern
from qkern.cli import exit_codes, main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def quantized(tmp_path: Path, base: Path) -> Path:
    qkern.quantize_checkpoint(base, tmp_path / "quantized")
    return tmp_path / "quantized"


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_convert_prints_what_became_of_what(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    assert call("convert", quantized, tmp_path / "dst", "--to", "bfloat16") == exit_codes.DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert "dequantized  nf4" in out
    assert f"\n{tmp_path / 'dst'}: 4 files" in out
    qkern.convert_checkpoint(quantized, tmp_path / "same", "bfloat16")
    assert tree(tmp_path / "dst") == tree(tmp_path / "same")


def test_dense_is_the_dtype_of_the_config_and_is_asked_for_without_one(
    quantized: Path, tmp_path: Path, capsys: Any
) -> None:
    config = quantized / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"dtype": "float16"}))
    assert call("convert", quantized, tmp_path / "dense", "--to", "dense") == exit_codes.DONE
    qkern.convert_checkpoint(quantized, tmp_path / "same", "float16")
    assert tree(tmp_path / "dense") == tree(tmp_path / "same")
    config.write_text(json.dumps(content | {"dtype": None}))
    assert call("convert", quantized, tmp_path / "none", "--to", "dense") == exit_codes.USAGE
    assert "bfloat16, float16 or float32 (--to bfloat16)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_convert_says_the_same_to_programs(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--to", "qkern", "--threads", "2", "--dry-run", "--json"]
    assert call("convert", quantized, tmp_path / "dst", *arguments) == exit_codes.DONE
    content = json.loads(capsys.readouterr().out)
    assert content["dry_run"]
    assert {row["action"] for row in content["tensors"]} == {"copied", "codes copied"}
    assert not (tmp_path / "dst").exists()


def test_convert_ends_with_the_code_of_what_is_wrong(
    base: Path, quantized: Path, tmp_path: Path, capsys: Any
) -> None:
    dst = tmp_path / "dst"
    assert call("convert", base, dst, "--to", "qkern") == exit_codes.USAGE
    assert call("convert", base, dst, "--to", "gguf") == exit_codes.USAGE
    assert call("convert", tmp_path / "none", dst, "--to", "qkern") == exit_codes.IO
    assert call("convert", base, dst, "--to", "qkern", "--format", "nf4", "--quiet") == 0
    assert call("convert", quantized, dst, "--to", "float16") == exit_codes.IO
    assert call("convert", quantized, dst, "--to", "float16", "--force", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "is dense: name the format" in err
    assert "replace them with force (--force)" in err


def test_merge_prints_what_is_kept(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", model()), tmp_path / "out"
    assert call("merge", quantized, adapter, out, "--dtype", "float32") == exit_codes.DONE
    text = capsys.readouterr().out
    assert f"{adapter}: added to 6 weights" in text
    assert "kept of what it adds: " in text
    qkern.merge_checkpoint(quantized, adapter, tmp_path / "same", dtype="float32")
    assert tree(out) == tree(tmp_path / "same")


def test_merge_refuses_what_loses_the_adapter(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", model(), size=0.02), tmp_path / "out"
    arguments = ["merge", quantized, adapter, out, "--format", "nf4", "--blocksize", "64"]
    assert call(*arguments) == exit_codes.NO
    assert "merge to bfloat16" in capsys.readouterr().err
    assert not out.exists()
    assert call(*arguments, "--min-kept", "2") == exit_codes.USAGE
    assert call(*arguments, "--force", "--json") == exit_codes.DONE
    content = json.loads(capsys.readouterr().out)
    assert content["kept"] < 0.1
    assert len(content["merged"]) == 6
    assert tensors_of(out)


def test_both_run_without_torch(quantized: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", model())
    calls = [
        ("convert", quantized, tmp_path / "dst", "--to", "float32"),
        ("merge", quantized, adapter, tmp_path / "out"),
    ]
    for arguments in calls:
        found = run_without({"torch", "safetensors"}, *map(str, arguments))
        assert found.returncode == 0, found.stderr
