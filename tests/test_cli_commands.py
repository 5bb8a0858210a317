"""The commands: what they print, where, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model, write_chats, write_jsonl

from qkern.cli import COMMANDS, exit_codes, main
from qkern.errors import CorruptFileError, CoverageError, DataError, MissingDependencyError

BOTH = ["finetune", "m", "d", "-o", "x", "--resume", "--overwrite"]
QUANTIZED = ["--quant-type", "int8", "--blocksize", "32", "--no-double-quant"]
FAST = ["--steps", "2", "--batch-size", "4", "--r", "4", "--lr", "0.02", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def adapter(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    assert call("finetune", model_dir, data, "-o", out, *FAST, *QUANTIZED) == 0
    return out


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: Any) -> None:
    assert call(command, "--help") == exit_codes.DONE
    out = capsys.readouterr().out
    assert f"example:\n  qkern {command}" in out
    assert "--json" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["finetune"], ["finetune", "m", "d", "-o", "x", "--r", "two"], BOTH],
)
def test_usage_errors(arguments: list[str], capsys: Any) -> None:
    assert main(arguments) == exit_codes.USAGE
    assert "usage: qkern" in capsys.readouterr().err


def test_the_version_is_shown(capsys: Any) -> None:
    assert call("--version") == exit_codes.DONE
    assert capsys.readouterr().out.startswith("qkern ")


def test_finetune_prints_figures_on_stdout_and_progress_on_stderr(
    model_dir: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call("finetune", model_dir, data, "-o", tmp_path, *FAST) == exit_codes.DONE
    out, err = capsys.readouterr()
    assert "last loss" in out
    assert "first example" not in out
    assert "[[ok: 0<|im_end|>]]" in err
    assert "24 examples" in err
    assert "loss=" in err
    assert "tok/s=" in err
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_finetune_json(model_dir: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert call("finetune", model_dir, data, "-o", tmp_path, *FAST, "--json") == exit_codes.DONE
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert result["output_dir"] == str(tmp_path)
    assert {"first_loss", "last_loss", "tokens_per_second", "peak_memory"} <= result.keys()


def test_dry_run_shows_the_example_and_writes_nothing(
    model_dir: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    out_dir = tmp_path / "out"
    assert call("finetune", model_dir, data, "-o", out_dir, "--dry-run") == exit_codes.DONE
    out = capsys.readouterr().out
    assert "[[ok: 0<|im_end|>]]" in out
    assert "would run 6 steps of 4 sequences" in out
    assert not out_dir.exists()
    assert call("finetune", model_dir, data, "-o", out_dir, "--dry-run", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["examples"], content["steps"]) == (24, 6)
    assert "[[ok: 0" in content["preview"]


def test_bad_data_ends_with_4_and_one_line(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "b"}])
    assert call("finetune", model_dir, path, "-o", tmp_path / "o", "--json") == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith(f"qkern finetune: {path}, line 2: no training text")
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"]) == ("DataError", 4)


def test_a_missing_model_ends_with_5(data: Path, tmp_path: Path, capsys: Any) -> None:
    code = call("finetune", tmp_path / "none", data, "-o", tmp_path / "o")
    assert code == exit_codes.IO
    assert "none" in capsys.readouterr().err


def test_settings_out_of_range_end_with_2(
    model_dir: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call("finetune", model_dir, data, "-o", tmp_path / "o", "--lr", "-1") == 2
    assert "lr is -1.0: allowed is more than 0" in capsys.readouterr().err
    assert call("generate", model_dir, "hi", "--top-p", "0") == 2
    assert call("generate", model_dir, "hi", "--no-chat", "--system", "s") == 2


def test_an_earlier_run_ends_with_5_and_resume_finds_it_done(
    adapter: Path, model_dir: Path, data: Path, capsys: Any
) -> None:
    assert call("finetune", model_dir, data, "-o", adapter, *FAST) == exit_codes.IO
    assert "earlier run" in capsys.readouterr().err
    assert call("finetune", model_dir, data, "-o", adapter, "--resume", "--lr", "0.5") == 2
    assert "lr 0.02 to 0.5" in capsys.readouterr().err
    assert call("finetune", model_dir, data, "-o", adapter, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_a_wrong_target_or_an_earlier_run_ends_before_the_data_is_tokenized(
    adapter: Path, model_dir: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    wrong = ("-o", tmp_path / "o", "--target-modules", "q_proj,query")
    for dry in ((), ("--dry-run",)):
        assert call("finetune", model_dir, data, *wrong, *FAST, *dry) == exit_codes.BAD_INPUT
        out, err = capsys.readouterr()
        assert "'query' matches no quantized layer" in err
        assert "examples" not in out + err
    assert call("finetune", model_dir, data, "-o", adapter, *FAST) == exit_codes.IO
    err = capsys.readouterr().err
    assert "--resume, --overwrite" in err
    assert "examples" not in err
    assert call("finetune", model_dir, data, "-o", adapter, *FAST, "--dry-run") == exit_codes.DONE


def test_what_quantize_makes_of_the_base_is_what_finetune_trained_over(
    adapter: Path, model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base"
    assert call("quantize", model_dir, base, *QUANTIZED, "--quiet") == exit_codes.DONE
    assert call("merge", base, adapter, tmp_path / "out") == exit_codes.DONE
    assert "the base is the one that the adapter was trained over" in capsys.readouterr().out


def test_interrupt_saves_and_ends_with_130(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """A real process, a real signal."""
    arguments = ["finetune", str(model_dir), str(data), "-o", str(tmp_path), *FAST]
    arguments[arguments.index("--steps") + 1] = "100000"
    command = [sys.executable, "-m", "qkern", *arguments, "--save-steps", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        seen = b""
        deadline = time.monotonic() + 60
        while b"loss=" not in seen and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 1 << 16)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == exit_codes.INTERRUPTED, (seen + err).decode()
    assert out == b""
    text = err.decode()
    assert "finishing the step and saving a checkpoint" in text
    assert "Traceback" not in text
    saved = list(tmp_path.glob("checkpoint-*"))
    assert len(saved) == 1
    assert str(saved[0]) in text
    assert "--resume" in text


def test_generate_streams_to_stdout(adapter: Path, model_dir: Path, capsys: Any) -> None:
    code = call("generate", model_dir, "--adapter", adapter, "--max-new-tokens", "5", "say ab 1")
    out, _ = capsys.readouterr()
    assert code == exit_codes.DONE
    assert out.endswith("\n")
    assert "say" not in out


def test_generate_json_counts_tokens(adapter: Path, model_dir: Path, capsys: Any) -> None:
    arguments = ["--adapter", adapter, "--max-new-tokens", "5", "--json"]
    assert call("generate", model_dir, "hi", *arguments) == exit_codes.DONE
    chat = json.loads(capsys.readouterr().out)
    assert call("generate", model_dir, "hi", *arguments, "--no-chat") == exit_codes.DONE
    plain = json.loads(capsys.readouterr().out)
    assert chat["prompt"] == plain["prompt"] == "hi"
    assert chat["prompt_tokens"] == plain["prompt_tokens"] + 19
    assert 1 <= chat["tokens"] <= 5
    assert call("generate", model_dir, "hi", *arguments, "--system", "be brief") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > chat["prompt_tokens"]


def test_generate_samples_by_seed_and_reads_stdin(
    model_dir: Path, capsys: Any, monkeypatch: Any
) -> None:
    import io

    texts = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a question"))
        arguments = ["--temperature", "1.5", "--seed", seed, "--max-new-tokens", "8", "--json"]
        assert call("generate", model_dir, "-", *arguments, "--quant-type", "nf4") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_generate_uses_the_adapters_own_format(adapter: Path, model_dir: Path) -> None:
    from qkern.adapters import read_quantization
    from qkern.formats import QuantFormat
    from qkern.layers import QLoRALinear
    from qkern.training.base import load_finetuned

    assert read_quantization(adapter) == QuantFormat("int8", 32, double_quant=False)
    model = load_finetuned(model_dir, adapter)
    formats = {m.quantized_weight.format for m in model.modules() if isinstance(m, QLoRALinear)}
    assert formats == {QuantFormat("int8", 32, double_quant=False)}


def test_generate_computes_in_int8_where_weights_are_quantized(
    adapter: Path, model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    import qkern
    from qkern.formats import QuantFormat
    from qkern.layers import QuantizedLinear
    from qkern.training.base import load_finetuned

    arguments = ["generate", model_dir, "hi", "--max-new-tokens", "2", "--compute", "int8"]
    assert call(*arguments, "--adapter", adapter) == exit_codes.DONE
    capsys.readouterr()
    assert call(*arguments) == exit_codes.USAGE
    assert "compute is 'int8', but no weight of" in capsys.readouterr().err
    qkern.save(load_finetuned(model_dir, fmt=QuantFormat()), tmp_path)
    sources = ((model_dir, adapter, None), (model_dir, None, QuantFormat()), (tmp_path, None, None))
    for path, own, fmt in sources:
        model = load_finetuned(path, own, fmt=fmt, compute="int8")
        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert {layer.compute for layer in layers} == {"int8"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 4),
        (CorruptFileError("x"), 4),
        (CoverageError("x"), 3),
        (MissingDependencyError("x"), 5),
        (FileNotFoundError("x"), 5),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_codes.of(error) == code


def test_the_command_line_starts_fast() -> None:
    code = (
        "import sys, qkern.cli; qkern.cli.main(['finetune', '--help']);"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
