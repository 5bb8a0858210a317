"""Every bench runs, on a case so small that only its correctness is shown."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a bench by its name."""
    monkeypatch.syspath_prepend(str(BENCHES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_codec_bench_compares_equal_results_and_prints_its_rows(
    load: Callable[[str], ModuleType],
) -> None:
    bench = load("bench_codec")
    rows = bench.run(size=128, repeats=2, min_time=0.0)
    engines = {row["engine"] for row in rows}
    assert {"qkern", "bitsandbytes", "qkern, scalar forced"} <= engines
    assert all(row["median"] > 0 for row in rows)
    assert "bitsandbytes" in bench.table(rows)


def test_double_quant_bench_measures_each_package_or_names_it(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("bench_double_quant")
    rows = {row["engine"]: row for row in bench.run(sizes=[256])}
    error = "relative RMS error, small rows"
    assert rows["qkern"][error] == rows["qkern, fp32 scales"][error] < 0.1
    assert rows["bitsandbytes, nested"]["bits per weight"] < 4.13
    text = bench.table(list(rows.values())) + capsys.readouterr().out
    for engine in bench.ENGINES:
        assert engine in text
        assert engine in rows or f"{engine} is left out" in text


def test_figures_in_the_readme_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    readme = importlib.import_module("readme")
    text = readme.README.read_text()
    assert readme.updated(text) == text
