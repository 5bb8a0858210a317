"""The GPU bench: every stage runs in the interpreter; what it leaves out, judges and survives."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bench_modules import loader


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a bench by its name."""
    return loader(monkeypatch)


@pytest.fixture
def interpreter() -> None:
    """Triton's, up to version 3.2 at least, takes arrays for numbers, which NumPy 2.4 refuses."""
    triton = pytest.importorskip("triton")

    @triton.jit
    def count(out, n):  # type: ignore[no-untyped-def]
        for _ in range(n):
            out += 1

    try:
        count[(1,)](torch.zeros(1, dtype=torch.int32), 2)
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip(f"Triton {triton.__version__} cannot interpret with NumPy {np.__version__}")


@pytest.mark.usefixtures("interpreter")
def test_gpu_bench_runs_each_stage_in_the_interpreter_and_says_that_its_times_mean_nothing(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    bench = load("bench_gpu")
    assert bench.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["quick"]
    assert content["goals"] == []
    assert not content["failed"]
    assert not content["dropped"]
    rows = content["rows"]
    assert {row["stage"] for row in rows} == set(bench.STAGES)
    assert not any(row.get("wrong") for row in rows)
    reasons = {row["engine"]: row["absent"] for row in rows if "absent" in row}
    assert reasons == {"shuffle": "no kernels for cpu"}
    linear = {"qkern", "torch bf16", "bitsandbytes gemm_4bit", "Unsloth sequence"}
    trained = {"qkern", "Unsloth sequence", "PEFT + bitsandbytes"}
    expected = {"linear": linear, "forward and backward": trained, "training step": trained}
    expected |= {"quantize": {"copy", "qkern", "bitsandbytes"}, "decode": {"table"}}
    for case, engines in expected.items():
        timed = [row for row in rows if row["case"] == case and "median" in row]
        assert engines <= {row["engine"] for row in timed}, case
        assert all("error" in row for row in timed if row["engine"] in trained), case
    assert "no time here means anything" in capsys.readouterr().out


def test_gpu_bench_leaves_out_what_matters_least_and_keeps_rows_before_a_failure(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("bench_gpu")
    run, plans = (importlib.import_module(name) for name in ("gpu_run", "gpu_plan"))

    def broken() -> Any:
        yield {"case": "before"}
        msg = "no such product"
        raise ValueError(msg)

    def cell(name: str, importance: int, seconds: float, work: Any = lambda: [{}]) -> Any:
        return plans.Cell("linear", name, importance, seconds, work)

    listed = [cell("late", 3, 40), cell("first", 0, 90), cell("bad", 1, 1, broken)]
    listed += [cell("second", 1, 1), cell("last", 3, 1)]
    monkeypatch.setattr(plans, "cells", lambda *_: listed)
    results = run.Results(tmp_path / "gpu.json")
    plan = plans.Plan(torch.device("cpu"), quick=True)
    assert run.work(plan, ("linear",), results, time.time() + 20)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert list(content["done"]) == ["linear: first", "linear: second", "linear: last"]
    assert content["dropped"].keys() == {"linear: late"}
    assert "ValueError: no such product" in content["failed"]["linear: bad"]
    row = {"stage": "linear", "cell": "linear: bad", "case": "before"}
    assert row in content["rows"]
    again = run.Results.load(tmp_path / "gpu.json")
    assert run.work(plan, ("linear",), again, time.time() + 20)
    assert again.content["rows"] == content["rows"]


def test_gpu_bench_leaves_a_process_whose_device_is_lost_and_goes_on_in_another(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a failed capture torch draws no random numbers on the device in that process."""
    load("bench_gpu")
    names = ("gpu_run", "gpu_plan", "gpu_device")
    run, plans, device = map(importlib.import_module, names)
    listed = [plans.Cell("codec", name, 1, 1, lambda: [{}]) for name in ("one", "two")]
    monkeypatch.setattr(plans, "cells", lambda *_: listed)
    monkeypatch.setattr(device, "is_lost", lambda _: True)
    results = run.Results(tmp_path / "gpu.json")
    plan = plans.Plan(torch.device("cpu"), quick=True)
    for done in (["codec: one"], ["codec: one", "codec: two"]):
        assert not run.work(plan, ("codec",), results, time.time() + 20)
        assert list(run.Results.load(results.path).content["done"]) == done
        assert not results.content["failed"]
    assert run.work(plan, ("codec",), results, time.time() + 20)


def test_gpu_bench_goes_on_from_results_of_the_same_code_and_machine_alone(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load("bench_gpu")
    run = importlib.import_module("gpu_run")
    earlier = run.Results(tmp_path / "earlier.json")
    machine = {"commit": "a", "code": "1", "device": {"name": "G"}}
    rows = [{"cell": "linear: one", "median": 1.0}, {"cell": "linear: two", "median": 2.0}]
    earlier.content |= {"machine": machine, "quick": False, "done": {"linear: one": 3.0}}
    earlier.content |= {"rows": rows, "failed": {"linear: two": "?"}, "before": {"clock": "9"}}
    earlier.save()
    other_commit, other_code = machine | {"commit": "b"}, machine | {"code": "2"}
    for about, why_not in ((other_code, "another machine"), (other_commit, "")):
        now = run.Results(tmp_path / "now.json")
        now.content |= {"machine": about, "quick": False}
        assert now.resume(earlier.path).startswith(why_not)
        assert now.rows == ([] if why_not else rows[:1])
        assert now.content["done"] == ({} if why_not else {"linear: one": 3.0})
        assert now.content["failed"] == {}
    assert now.content["earlier"][0]["before"] == {"clock": "9"}


def test_gpu_bench_goes_on_after_a_process_that_died_or_hung(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("bench_gpu")
    run, out = importlib.import_module("gpu_run"), tmp_path / "gpu.json"
    script = tmp_path / "bench.py"
    script.write_text(
        "import json, os, pathlib, time\n"
        f"path = pathlib.Path({str(out)!r})\n"
        "content = json.loads(path.read_text())\n"
        "turn = len(content['failed'])\n"
        "running = {'cell': f'turn {turn}', 'since': time.time(), 'seconds': 0}\n"
        "content['running'] = running if turn < 2 else None\n"
        "path.write_text(json.dumps(content))\n"
        "if turn == 0:\n    os._exit(7)\n"
        "if turn == 1:\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(run, "BENCH", script)
    monkeypatch.setattr(run, "PATIENCE", 0)
    run.Results(out).save()
    run.supervise([], out, time.time() + 50)
    failed = json.loads(out.read_text())["failed"]
    assert failed["turn 0"] == "the process ended with status 7"
    assert "took longer" in failed["turn 1"]
    assert len(failed) == 2


def test_gpu_bench_judges_goals_and_times_nothing_that_is_wrong(
    load: Callable[[str], ModuleType],
) -> None:
    load("bench_gpu")
    report, linear = (importlib.import_module(name) for name in ("gpu_report", "gpu_linear"))
    about = {"case": "linear", "dtype": "bf16", "M": 8, "N": 14336, "K": 4096}
    ratio = {"qkern is times faster": 2.0, "median": 1e-5, "engine": "torch bf16"}
    rows = [about | ratio, about | {"engine": "bitsandbytes", "absent": "ImportError: none"}]
    rows.append(about | ratio | {"engine": "qkern", "qkern is times faster": 1.0})
    judged = {row["goal"]: row for row in report.goals(rows)}
    found = judged.pop("M=8, 14336x4096, times faster than torch bf16")
    assert (found["measured"], found["verdict"]) == (2.0, "must")
    assert {row["verdict"] for row in judged.values()} == {"not measured"}
    content = {"rows": rows, "dropped": {"a cell": "needs 9 s, 1 left"}, "failed": {"b": "x\ny"}}
    text = report.report(content)
    for line in (
        "absent: bitsandbytes: ImportError: none",
        "dropped: a cell: needs",
        "FAILED: b: y",
    ):
        assert line in text
    inputs = linear.Inputs(4, 64, torch.device("cpu"))
    w = torch.randn(32, 64)
    way = linear.Linear("qkern", [w], lambda w, x: x @ w.bfloat16().roll(1, 0).mT, w.float)
    with pytest.raises(importlib.import_module("gpu_timing").WrongResultError, match="qkern, M=4"):
        inputs.check(way, 4)
