"""The examples of TRL's trainers run as they are, on their tiny model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

pytest.importorskip("trl", reason="the examples train by TRL, which is not installed")
pytest.importorskip("peft", reason="the examples train PEFT's adapters, which is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL reports its use otherwise
    return importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["trl_sft", "trl_dpo"], indirect=True)
def test_a_trainer_of_trl_runs_unmodified(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.run(None, 3, tmp_path) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    losses = next(line for line in lines if line.startswith("losses: "))
    assert len(losses.split()) == 4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118 - it is no dict
