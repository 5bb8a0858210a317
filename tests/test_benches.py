"""Every bench runs, on a case so small that only its correctness is shown."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_modules import BENCHES, loader
from safetensors.torch import save_file
from toys import tiny_llama, token_ids

import qkern


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a bench by its name."""
    return loader(monkeypatch)


def test_codec_bench_compares_equal_results_and_prints_its_rows(
    load: Callable[[str], ModuleType],
) -> None:
    bench = load("bench_codec")
    rows = bench.run(size=128, repeats=2, min_time=0.0)
    engines = {row["engine"] for row in rows}
    assert {"qkern", "bitsandbytes", "qkern, scalar forced"} <= engines
    assert all(row["median"] > 0 for row in rows)
    assert "bitsandbytes" in bench.table(rows)


def test_bitsandbytes_plugin_bench_compares_both_sides(
    load: Callable[[str], ModuleType],
) -> None:
    bench = load("bench_bitsandbytes_plugin")
    rows = bench.run(size=128, repeats=2, min_time=0.0)
    assert {row["engine"] for row in rows} == {"bitsandbytes", "with the plug-in"}
    assert not bench.plugin.is_enabled()
    assert "Linear4bit, eval, M=512" in bench.table(rows)


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, drops pages by posix_fadvise")
def test_loftq_bench_measures_residuals_and_losses(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("loftq_quality")
    model = tiny_llama()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    weights = bench.linear_weights(tmp_path / "model.safetensors")
    assert len(weights) == 14
    rows = bench.residual_rows("tiny", dict(list(weights.items())[:2]), r=8)
    value = {(r["layer"], r["method"], r["iterations"]): r["value"] for r in rows}
    for (layer, method, _), found in value.items():
        assert found <= value[layer, method, 0] < 0.1
    monkeypatch.setattr(bench, "VARIANTS", dict(list(bench.VARIANTS.items())[1:4]))
    texts = [token_ids(1, 9), token_ids(1, 12)]
    rows += bench.loss_rows(model, texts, texts, r=4, steps=1, lr=1e-3, seeds=1)
    assert all(row["value"] > 0 for row in rows)
    assert "NF4 + LoftQ 1" in bench.table(rows)


def test_checkpoint_bench_compares_quantizing_with_reading(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    bench = load("bench_checkpoint")
    source, target = tmp_path / "source", tmp_path / "target"
    rows = bench.run(source, target, 0, threads=2, repeats=1, cold=True)
    assert not source.exists()
    assert not target.exists()
    quantized = [row for row in rows if row["case"].startswith("quantize")]
    assert [row["quantized"] for row in quantized] == [1, 1, 1, 1]
    assert all(0 < row["anonymous_peak"] < 300e6 for row in quantized)
    assert quantized[2]["address_space"] == bench.ADDRESS_SPACE
    text = bench.table(rows)
    assert all(row["case"] in text for row in rows)
    whole = bench.shapes(bench.SEVEN_BILLION)
    assert sum(2 * int(np.prod(shape)) for shape in whole.values()) == bench.SEVEN_BILLION
    assert len(bench.shapes(bench.SEVEN_BILLION // 8)) < len(whole) // 7


@pytest.fixture
def cpu(load: Callable[[str], ModuleType]) -> Callable[..., list[dict[str, Any]]]:
    """Run sections of the CPU bench, tiny, without other packages' layers."""
    bench = load("bench_cpu")

    def run(*sections: str) -> list[dict[str, Any]]:
        plan = bench.Plan(quick=True, peers=False, cores=frozenset())
        rows: list[dict[str, Any]] = bench.run(plan, sections)
        assert {row["section"] for row in rows} == set(sections)
        return rows

    return run


def test_cpu_bench_runs_each_section_and_reports_it(
    cpu: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = cpu("limits", "codec", "linear", "train", "model")
    timed = [row for row in rows if "absent" not in row]
    assert all(row["median"] > 0 for row in timed)
    cases = {row["case"] for row in timed}
    layers = {"linear", "linear, small", "forward and backward with LoRA", "LoRA on top"}
    codec = {"quantize", "dequantize", "quantize, small", "dequantize, small"}
    layers, codec = layers | {"linear, weight in L2"}, codec | {"codec, values in L2"}
    assert cases == {"limits", "decode", "training step"} | codec | layers
    for case in ("linear", "forward and backward with LoRA", "decode", "training step"):
        engines = {row["engine"] for row in timed if row["case"] == case}
        assert {"qkern", "qkern, int8 compute", "torch bf16"} <= engines, case
    exact = [r for r in timed if r["case"] == "linear" and r["dtype"] == "fp32" and "error" in r]
    assert all(row["error"] < 1e-6 for row in exact)
    report = importlib.import_module("cpu_report")
    assert "/ read" in report.table(rows)
    assert report.plot(rows, tmp_path / "ladder.svg").read_text().startswith("<?xml")


def test_cpu_bench_measures_two_threads_beside_one(
    cpu: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = cpu("threads")
    assert {row["threads"] for row in rows} == {1, 2}
    assert {row["clock"] for row in rows} == {"wall"}
    one, two = ([r["engine"] for r in rows if r["threads"] == n] for n in (1, 2))
    assert one == two
    assert {"quantize fp32, 256x256", "qkern, 256x256, M=1", "qkern with LoRA, M=1"} <= set(one)


def test_cpu_bench_switches_the_threads_of_codec_and_torch(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, asked = load("cpu_threads"), []
    native = importlib.import_module("qkern._native")
    codec = importlib.import_module("qkern.codec")

    def quantize_4bit(*args: Any, **settings: Any) -> None:
        asked.append((settings["threads"], torch.get_num_threads()))
        return native.quantize_4bit(*args, **settings)

    before = torch.get_num_threads()
    watched = SimpleNamespace(**vars(native) | {"quantize_4bit": quantize_4bit})
    monkeypatch.setattr(codec, "_native", watched)
    calls = [partial(qkern.quantize, torch.randn(64, 64))]
    try:
        for n in (2, 1, 2):
            threads.Switched("quantize", calls, threads=n).measure(1)
    finally:
        torch.set_num_threads(before)
    assert asked == [(2, 2), (1, 1), (2, 2)]


def test_cpu_bench_times_no_layer_that_multiplies_another_weight(
    load: Callable[[str], ModuleType],
) -> None:
    load("bench_cpu")
    engines = importlib.import_module("cpu_engines")
    effort = importlib.import_module("cpu_timing").QUICK
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer, inputs = engines.with_qkern(w, effort), engines.Inputs(w, 4)
    assert layer.engine(inputs, 4).facts["error"] < 5e-3
    layer.call = lambda q, x: x @ q.dequantize(x.dtype).roll(1, 0).mT
    with pytest.raises(engines.WrongResultError, match="qkern, M=4: relative error"):
        layer.engine(inputs, 4)


def test_cpu_bench_judges_goals_and_lists_what_is_absent(
    load: Callable[[str], ModuleType],
) -> None:
    report = load("cpu_report")
    about = {"case": "linear", "dtype": "bf16", "N": 4096, "K": 4096, "M": 1, "clock": "thread CPU"}
    times = {"qkern": 1.0, "ggml Q4_0 AMX": 1.1, "ggml Q4_K CPU": 3.0}
    rows = [{**about, "engine": e, "median": t, "quartiles": [t, t]} for e, t in times.items()]
    rows.append({**about, "engine": "torchao int4", "absent": "ImportError: no torchao"})
    judged = {row["goal"]: row for row in report.goals(rows)}
    found = judged.pop("linear M=1, times faster than ggml's best")
    assert found["measured"] == pytest.approx(1.1)
    assert found["verdict"] == "must"
    assert {row["verdict"] for row in judged.values()} == {"not measured"}
    assert "absent: torchao int4: ImportError: no torchao" in report.table(rows)


def test_saved_cpu_figures_come_into_the_readme(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, harness, readme = load("bench_cpu"), load("harness"), load("readme")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme._cpu() == []
    about = {"case": "linear", "dtype": "bf16", "N": 4096, "K": 4096, "clock": "thread CPU"}
    ratio = "times faster than torch bf16"
    rows = [{**about, "M": M, "engine": "qkern", "median": 1.0, ratio: M / 8} for M in (8, 32)]
    bench.save(rows)
    text = "\n".join(readme._cpu())
    assert f"| linear M=32, qkern, {ratio} | 4 |" in text
    assert "fp32, share of read" not in text
    (saved,) = tmp_path.glob("cpu_*.json")
    assert saved.with_suffix(".svg").exists()
    assert f"{saved.stem}.svg" in text
    # Another machine's figures stand beside them.
    goals = [{"goal": "linear M=32, qkern, " + ratio, "measured": 9.0}]
    other = {"machine": harness.machine() | {"cpu": "Another"}, "goals": goals}
    (tmp_path / "cpu_zzz.json").write_text(json.dumps(other))
    assert f"| linear M=32, qkern, {ratio} | 4 | 9 |" in "\n".join(readme._cpu())


def test_limits_of_memory_need_a_compiler_and_say_so(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = load("limits")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(limits.NoCompilerError, match=r"limits\.c needs a C compiler"):
        limits.library()
    monkeypatch.delenv("CC")
    limits.check()


def test_figures_in_the_readme_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    readme = importlib.import_module("readme")
    text = readme.README.read_text()
    assert readme.updated(text) == text


def test_merge_bench_trains_merges_and_times_every_variant(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("merge_quality")
    monkeypatch.setattr(bench, "LENGTH", 16)
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(0, 8, (24, 16), generator=torch.Generator().manual_seed(0))
    task = bench.Task(model, ids[:16], ids[16:])
    rows = list(bench.run(task, seeds=[0], steps=4, rates=[1e-2])) + bench.time_rows(64, repeats=1)
    loss, share = rows[0]["loss"], rows[0]["share"]
    assert loss["adapter"] < loss["base"]
    assert set(loss) - set(share) == {"base", "adapter"}
    assert share["bf16 merge"] == pytest.approx(1, abs=0.05)
    assert [row["merge_into"] for row in rows[1:4]] == ["none", "absmax", "search"]
    monkeypatch.setattr(bench.harness, "RESULTS", tmp_path)
    bench.save(rows[1:])
    bench.save(rows[:2])
    assert len(json.loads((tmp_path / "merge_quality.json").read_text())["rows"]) == len(rows)
    assert all(name in bench.table(rows) for name in (*loss, "bfloat16"))
