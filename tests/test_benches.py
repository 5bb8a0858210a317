"""Every bench runs, on a case so small that only its correctness is shown."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHES))
    spec = importlib.util.spec_from_file_location("bench_codec", BENCHES / "bench_codec.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_codec", module)
    spec.loader.exec_module(module)
    return module


def test_codec_bench_compares_equal_results_and_prints_its_rows(bench: ModuleType) -> None:
    rows = bench.run(size=128, repeats=2, min_time=0.0)
    engines = {row["engine"] for row in rows}
    assert {"qkern", "bitsandbytes", "qkern, scalar forced"} <= engines
    assert all(row["median"] > 0 for row in rows)
    assert "bitsandbytes" in bench.table(rows)


def test_figures_in_the_readme_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    readme = importlib.import_module("readme")
    text = readme.README.read_text()
    assert readme.updated(text) == text
