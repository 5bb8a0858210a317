"""``qkern quantize``: what it prints, refuses, and how it ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import ends, layer, write_model
from file_trees import tree
from test_cli_doctor import run_without

import qkern
from qkern.checkpoint.journal import Journal
from qkern.cli import exit_codes, main


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", ends() | layer(0))


def call(*arguments: object) -> int:
    return main(["quantize", *(str(argument) for argument in arguments)])


def test_the_report_is_on_stdout(src: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(src, tmp_path / "dst") == exit_codes.DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert "an embedding, by its name" in out
    assert "2 of 7 weights quantized" in out
    assert f"\n{tmp_path / 'dst'}: 4 files, relative rms error 0.09" in out


def test_settings_reach_the_function(src: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--format", "fp4", "--blocksize", "128", "--no-double-quant", "--threads", "2"]
    arguments += ["--method", "search", "--include", "norm", "--exclude", "q_proj", "--json"]
    arguments += ["--embeddings", "int8_row", "--min-coverage", "0.1", "--strict"]
    assert call(src, tmp_path / "dst", *arguments) == exit_codes.DONE
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == {"quant_type": "fp4", "blocksize": 128, "double_quant": False}
    assert content["method"] == "search"
    rows = {row["name"]: row for row in content["tensors"]}
    assert rows["model.norm.weight"]["format"]["quant_type"] == "fp4"
    assert rows["model.embed_tokens.weight"]["format"]["quant_type"] == "int8_row"
    assert rows["model.layers.0.self_attn.q_proj.weight"]["reason"] == "excluded by 'q_proj'"
    assert content["worst"]
    other = tmp_path / "other"
    qkern.quantize_checkpoint(
        src,
        other,
        "fp4",
        blocksize=128,
        double_quant=False,
        method="search",
        include="norm",
        exclude="q_proj",
        embeddings="int8_row",
    )
    assert tree(other) == tree(tmp_path / "dst")


def test_quiet_says_nothing(src: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(src, tmp_path / "dst", "--quiet") == exit_codes.DONE
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "dst" / "config.json").exists()
    assert call(src, tmp_path / "other", "--quiet", "--json") == exit_codes.DONE
    assert json.loads(capsys.readouterr().out)["dry_run"] is False


def test_a_dry_run_writes_nothing(src: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(src, tmp_path / "dst", "--dry-run") == exit_codes.DONE
    assert "nothing was written: 4 files would be" in capsys.readouterr().out
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--min-coverage", "0.99"], exit_codes.NO),
        (["--exclude", "nothing"], exit_codes.USAGE),
        (["--format", "int8", "--method", "search"], exit_codes.USAGE),
        (["--min-coverage", "2"], exit_codes.USAGE),
        (["--threads", "-1"], exit_codes.USAGE),
        (["--blocksize", "48"], exit_codes.USAGE),
    ],
)
def test_a_no_and_bad_usage_write_nothing(
    src: Path, tmp_path: Path, arguments: list[str], code: int, capsys: Any
) -> None:
    assert call(src, tmp_path / "dst", *arguments) == code
    assert capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_files_and_places_have_codes_of_their_own(src: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(tmp_path / "none", tmp_path / "dst") == exit_codes.IO
    assert call(src, src) == exit_codes.IO
    assert call(src, tmp_path / "dst", "--quiet") == exit_codes.DONE
    capsys.readouterr()
    assert call(src, tmp_path / "dst", "--json") == exit_codes.IO
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == "OutputError"
    assert err.startswith(f"qkern quantize: {tmp_path / 'dst'} holds model.safetensors")
    assert call(src, tmp_path / "dst", "--force", "--quiet") == exit_codes.DONE
    write_model(tmp_path / "nan", {"a.weight": torch.full((64, 64), float("nan"))})
    assert call(tmp_path / "nan", tmp_path / "other") == exit_codes.BAD_INPUT
    (src / "model.safetensors").write_bytes(b"no header")
    assert call(src, tmp_path / "other") == exit_codes.BAD_INPUT


def test_an_interrupt_says_how_to_go_on(
    src: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupt)
        assert call(src, tmp_path / "dst") == exit_codes.INTERRUPTED
    err = capsys.readouterr().err
    assert err == f"qkern quantize: interrupted: the same command goes on with {tmp_path / 'dst'}\n"
    assert call(src, tmp_path / "dst") == exit_codes.DONE


def test_it_needs_no_torch(src: Path, tmp_path: Path) -> None:
    hidden = {"torch", "safetensors", "transformers", "triton", "tqdm", "ml_dtypes"}
    done = run_without(hidden, "quantize", str(src), str(tmp_path / "dst"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["coverage"]["quantized"] == 2
