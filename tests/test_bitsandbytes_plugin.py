"""The bitsandbytes plug-in: how it is switched on and off, and what it says of itself."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_weights import bnb, bnbf, decoded, quantized, scaled

import qkern
from qkern.errors import MissingDependencyError
from qkern.integrations import bitsandbytes as plugin
from qkern.integrations import bitsandbytes_kernels
from qkern.ops import host

ROOT = Path(__file__).parents[1]


# -- switching -------------------------------------------------------------------------------


def test_enable_and_disable_take_turns(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, state = quantized(scaled(8, 64))
    calls = []
    decode = host.dequantize_into
    monkeypatch.setattr(host, "dequantize_into", lambda *a, **k: calls.append(1) or decode(*a, **k))
    counts = []
    for switch in (plugin.enable, plugin.enable, plugin.disable, plugin.disable, plugin.enable):
        switch()
        calls.clear()
        assert torch.equal(bnbf.dequantize_4bit(packed, state), decoded(packed, state, state.dtype))
        counts.append((plugin.is_enabled(), len(calls)))
    assert counts == [(True, 1), (True, 1), (False, 0), (False, 0), (True, 1)]


def test_operators_are_the_kernels_and_all_of_them_exist(with_plugin: None) -> None:
    assert set(plugin.OPERATORS) == set(bitsandbytes_kernels.KERNELS)
    assert plugin.enable() == plugin.OPERATORS
    assert plugin.status().is_on


def test_a_layer_keeps_what_it_knows_of_the_processor(without_plugin: None) -> None:
    layer = bnb.nn.Linear4bit(64, 64)
    before = layer.support_avx512bf16_for_cpu
    plugin.enable()
    assert layer.support_avx512bf16_for_cpu is False
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu is False
    plugin.disable()
    assert layer.support_avx512bf16_for_cpu == before


def test_the_example_runs(without_plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "bitsandbytes_plugin.py"), run_name="__main__")
    assert "largest error of a weight" in capsys.readouterr().out


# -- the entry point -------------------------------------------------------------------------

START = """
import os, sys
import bitsandbytes
from qkern.integrations import bitsandbytes as plugin
print(plugin.is_enabled(), plugin.status().is_on, "qkern.ops" in sys.modules)
os.environ["QKERN_BITSANDBYTES"] = "1"
print(plugin.status().is_on)
bitsandbytes._import_backends()
print(plugin.is_enabled())
"""


def test_installed_it_does_nothing_unless_the_variable_asks(tmp_path: Path) -> None:
    """The entry point of pyproject.toml, called by bitsandbytes."""
    entry = (ROOT / "pyproject.toml").read_text().partition(f'"{plugin.GROUP}"]\n')[2]
    name, _, value = entry.partition("\n")[0].replace('"', "").partition(" = ")
    info = tmp_path / "qkern-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qkern\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugin.GROUP}]\n{name} = {value}\n")
    path = os.pathsep.join([str(Path(qkern.__file__).parents[1]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "PYTHONPATH": path, plugin.VARIABLE: ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["False False False", "True", "True"], done.stderr
    assert "qkern" not in done.stderr


def test_bitsandbytes_imports_beside_a_broken_qkern(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "qkern.integrations.bitsandbytes_kernels", None)
    plugin.register()
    assert not plugin.is_enabled()
    assert "qkern's plug-in is off: the bitsandbytes plug-in needs" in caplog.text


def test_a_setting_that_is_not_known_is_said(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "yes")
    plugin.register()
    assert not plugin.is_enabled()
    assert "QKERN_BITSANDBYTES is 'yes': allowed are 1 (on)" in caplog.text
    assert "allowed are" in plugin.status().why


def test_an_entry_that_no_one_finds_is_said(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.setenv(plugin.VARIABLE, "1")
    assert plugin.status() == (
        importlib.metadata.version("bitsandbytes"),
        False,
        "qkern runs from its source: bitsandbytes finds installed ones alone",
        plugin.OPERATORS,
    )


def test_without_operators_to_replace_it_says_which_version_has_them(
    without_plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_exists", lambda torch, name: False)
    with pytest.raises(MissingDependencyError, match="install"):
        plugin.enable()
    assert not plugin.is_enabled()
