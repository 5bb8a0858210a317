"""``QkernConfig``, and how it is registered with transformers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hf_models import load, quantized_names, write_dense
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qkern
import qkern.integrations.transformers as door
from qkern.integrations.transformers import QkernConfig, model_config

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "nf5"}, "nf5"),
        ({"blocksize": 48}, "48"),
        ({"method": "best"}, "best"),
        ({"save_as": "gguf"}, "save_as"),
        ({"quant_type": "int8", "save_as": "bitsandbytes"}, "has no int8"),
    ],
)
def test_settings_are_refused_before_anything_is_read(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(qkern.FormatError, match=words):
        QkernConfig(**settings)


def test_an_unknown_argument_is_no_silent_default() -> None:
    with pytest.raises(TypeError, match="exclude"):
        QkernConfig("nf4", exclude=["lm_head"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": True}, r'load_in_4bit \(write QkernConfig\("nf4"\)\)'),
        ({"load_in_8bit": True}, "int8_row"),
        ({"block_size": 64}, r"block_size \(write blocksize=\)"),
        ({"bnb_4bit_use_double_quant": True}, r"write double_quant=\)"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "leave it out"),
        ({"quantization_type": "nf4"}, "write quant_type="),
        ({"colour": 1}, "colour .not known here.*arguments are quant_type, blocksize"),
    ],
)
def test_other_packages_names_are_answered_with_ours(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(qkern.ArgumentError, match=words) as raised:
        QkernConfig(**settings)
    assert "from_bitsandbytes" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "quant_type", "double_quant"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", False),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "fp4", True),
        ({"load_in_8bit": True}, "int8_row", False),
    ],
)
def test_a_bitsandbytes_config_becomes_one_of_the_same_format(
    dense: Path, given: dict[str, Any], quant_type: str, double_quant: bool
) -> None:
    theirs = transformers.BitsAndBytesConfig(**given, llm_int8_skip_modules=["down_proj"])
    config = QkernConfig.from_bitsandbytes(theirs)
    assert config.format.quant_type == quant_type
    assert config.format.double_quant == double_quant
    assert QkernConfig.from_bitsandbytes(theirs.to_dict()).to_dict() == config.to_dict()
    model = load(dense, quantization_config=config)
    assert len(quantized_names(model)) == 12


@pytest.mark.parametrize("given", [{}, {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}])
def test_a_bitsandbytes_config_that_quantizes_nothing_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(qkern.FormatError, match="one of the first two is needed"):
        QkernConfig.from_bitsandbytes(transformers.BitsAndBytesConfig(**given))


def test_model_config_refuses_what_is_not_quantized(dense: Path) -> None:
    with pytest.raises(qkern.FormatError, match="is not quantized"):
        model_config(dense)


def test_another_format_for_quantized_files_is_left_aside_with_a_warning(
    dense: Path, tmp_path: Path
) -> None:
    load(dense, quantization_config=QkernConfig("nf4")).save_pretrained(tmp_path / "own")
    qkern.quantize_checkpoint(dense, tmp_path / "bnb")
    for path in (tmp_path / "own", tmp_path / "bnb"):
        with pytest.warns(UserWarning, match="from the model will be used"):
            model = load(path, config=model_config(path), quantization_config=QkernConfig("int8"))
        assert model.hf_quantizer.quantization_config.quant_type == "nf4"
    with pytest.raises(ValueError, match="BitsAndBytesConfig but you are passing a QkernConfig"):
        load(tmp_path / "bnb", quantization_config=QkernConfig("int8"))


def test_importing_qkern_registers_nothing_and_the_one_line_does() -> None:
    code = "import sys, qkern; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert AUTO_QUANTIZER_MAPPING["qkern"] is door.QkernQuantizer
    importlib.reload(door)
    assert AUTO_QUANTIZER_MAPPING["qkern"] is door.QkernQuantizer


@pytest.mark.parametrize("stub", ["raise ImportError('too old a tokenizer')", "x = 1"])
def test_another_transformers_is_a_typed_error_that_names_the_version(
    tmp_path: Path, stub: str
) -> None:
    for name in ("transformers", "transformers/quantizers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '4.57.6'\n")
    (tmp_path / "transformers/quantizers/auto.py").write_text(
        f"{stub}\nAUTO_QUANTIZATION_CONFIG_MAPPING = {{}}\n"
        "register_quantization_config = register_quantizer = None\n"
    )
    (tmp_path / "transformers/quantizers/base.py").write_text("class HfQuantizer: pass\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import qkern\n"
        "try: import qkern.integrations.transformers\n"
        "except qkern.MissingDependencyError as error: print(error)\n"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "transformers 5.10 or newer is needed" in out
    assert ("too old a tokenizer" if "raise" in stub else "found: 4.57.6") in out
