"""The examples of transformers run, as they are documented, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import peft
import pytest
import transformers
from chat_model import save_chat_model

import qkern
from qkern.layers import QLoRALinear

pytestmark = pytest.mark.usefixtures("without_gpu")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("dense"))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_transformers_load(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "transformers_load.py", dense, tmp_path)
    out = capsys.readouterr().out
    assert out.count("same logits: True") == 2
    assert float(out.partition("logits differ by ")[2]) < 1e-4
    assert "the output head" in out


@pytest.mark.parametrize("name", ["transformers_load.py", "trainer.py"])
def test_a_missing_argument_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: {name}")
    assert "the following arguments are required: model" in err


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # torch's, where there is no accelerator
@pytest.mark.parametrize("kind", ["peft", "qkern"])
def test_trainer(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one line\n\nand another one\n" * 4)
    # Trainer would take an accelerator, which the example leaves to it.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(monkeypatch, "trainer.py", dense, text, tmp_path, "--adapter", kind, "--steps", 4)
    base = transformers.AutoModelForCausalLM.from_pretrained(dense)
    qkern.quantize_model(base)
    qkern.load_adapter(base, tmp_path / "adapter")
    adapters = [m for m in base.modules() if isinstance(m, QLoRALinear)]
    assert adapters
    assert all(layer.lora_B.abs().max() > 0 for layer in adapters)
    dense_model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    peft.PeftModel.from_pretrained(dense_model, tmp_path / "adapter")
