"""C21: an ``adapter_config.json`` that a stranger wrote: nothing imported, no time taken."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_net import adapted, inputs, quantized
from torch import nn

import qkern
from qkern.errors import FormatError
from qkern.layers import QLoRALinear
from qkern.patterns import matching_paths

CONFIG = "adapter_config.json"
# Each takes Python's own matcher time that doubles with every letter, or grows by a high power.
BOMBS = [
    r"(a+)+",
    r"(a|a)*",
    r"(a?){40}a{40}",
    r"(.*a){20}",
    r"(a|aa)+",
    "(a|a)" * 30,
    r"\w*" * 30 + "b",
    r"(([a-z])+.)+",
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    qkern.save_adapter(adapted(0), tmp_path)
    return tmp_path


def edit(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(content))


@pytest.mark.case("C21")
def test_nothing_that_a_configuration_names_is_imported(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "strange_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(saved))
    edit(
        saved,
        auto_mapping={"base_model_class": "Strange", "parent_library": "strange_module"},
        base_model_name_or_path="strange_module",
        peft_version="strange_module",
        target_modules=BOMBS[0],
        exclude_modules=BOMBS[0],
        layers_pattern=BOMBS[0],
        r=10**12,
        rank_pattern={BOMBS[0]: 10**12},
    )
    started = time.process_time()
    model = quantized(0)
    qkern.load_adapter(model, saved)
    assert time.process_time() - started < 1
    assert "strange_module" not in sys.modules
    assert torch.equal(model(inputs()), adapted(0)(inputs()))


@pytest.mark.case("C21")
def test_patterns_take_linear_time(saved: Path) -> None:
    names = ["a" * 200 + "!", *(f"{'a' * 40}.{i}.{'a' * 60}" for i in range(300))]
    for bomb in BOMBS:
        started = time.process_time()
        matching_paths(f"({bomb})!", names)
        assert time.process_time() - started < 1, bomb
    edit(saved, alpha_pattern={f"({bomb})!": 3 for bomb in BOMBS})
    model = quantized(0)
    qkern.load_adapter(model, saved)
    assert torch.equal(model(inputs()), adapted(0)(inputs()))


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "^q_proj",
        "layers.0",
        r"layers\.(0|1)\..*_proj",
        r"^l\w+\.1\.q",
        r".*\.q_proj",
        "a|b",
    ],
)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    names = [
        "q_proj",
        "q_proj.x",
        "layers.0",
        "m.layers.0.q_proj",
        "layers.1.q",
        "m.l.1.q",
        "x.a",
        "b",
    ]
    expected = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
    assert matching_paths(pattern, names) == expected


@pytest.mark.parametrize(
    "pattern", ["(", "a)|(b", "(?=a)", r"(a)\1", "a{1000}{1000}{1000}", "(" * 9999 + ")" * 9999]
)
def test_patterns_that_are_not_matched_are_refused(pattern: str, saved: Path) -> None:
    with pytest.raises(FormatError):
        matching_paths(pattern, ["a"])
    edit(saved, alpha_pattern={pattern: 3})
    with pytest.raises(
        qkern.AdapterMismatchError, match=r"alpha_pattern .* cannot be matched here"
    ):
        qkern.load_adapter(quantized(0), saved)


def test_the_first_pattern_that_matches_decides(saved: Path) -> None:
    edit(saved, alpha_pattern={"down": 3, ".*": 5, "up": 7})
    model = quantized(0)
    qkern.load_adapter(model, saved)
    found = {n: m.lora_alpha for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    assert set(found.values()) <= {3.0, 5.0}
    assert all(alpha == (3.0 if name.endswith("down") else 5.0) for name, alpha in found.items())


@pytest.mark.case("C21")
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": [16]},
        {"lora_alpha": 1e999},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_dropout": "0.1"},
        {"alpha_pattern": ["a"]},
        {"alpha_pattern": {"a": "3"}},
    ],
)
def test_numbers_that_are_none(changes: dict[str, Any], saved: Path) -> None:
    edit(saved, **changes)
    model = quantized(0)
    with pytest.raises(qkern.CorruptFileError, match=r"is needed"):
        qkern.load_adapter(model, saved)
    assert not any(isinstance(module, QLoRALinear) for module in model.modules())


def test_a_model_of_another_kind_is_left_alone(saved: Path) -> None:
    with pytest.raises(qkern.AdapterMismatchError):
        qkern.load_adapter(nn.Sequential(nn.Linear(64, 64)), saved)
