"""``qkern doctor``: works wherever Python does, and tells what will run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from qkern import _native
from qkern.cli import doctor, main
from qkern.integrations import bitsandbytes

# Hides packages from import and from find_spec, as on a machine without them.
BLOCK = """
import importlib.metadata, sys
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked or name in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in blocked else find_spec(name, *a)
version = importlib.metadata.version
def hidden(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
from qkern.cli import main
sys.exit(main({arguments!r}))
"""


def run_without(blocked: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(blocked=blocked, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def paths_of(report: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(path["operation"], path["device"]): path["path"] for path in report["paths"]}


def test_json_report(capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["qkern"] == _native.__version__
    assert report["versions"]["torch"]
    assert report["machine"]["simd"] == _native.simd()
    assert report["machine"]["cores"] >= 1
    operations = {path["operation"] for path in report["paths"]}
    assert operations == {"quantize", "dequantize", "linear"}
    for operation in operations:
        assert paths_of(report)[operation, "cpu"] == f"Rust, {_native.simd()}"
    assert all(path["why"] for path in report["paths"])


def test_tables(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "bitsandbytes", "simd", "operation", "linear"):
        assert word in out


def test_without_torch() -> None:
    done = run_without({"torch", "transformers", "trl", "peft", "triton"}, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] is None
    assert "torch is not installed" in report["machine"]["gpu"]
    paths = paths_of(report)
    assert paths["quantize", "cpu"].startswith("Rust")
    assert paths["linear", "cpu"] == "nothing"


def test_absent_packages_are_shown_in_the_table() -> None:
    done = run_without({"torch", "bitsandbytes"}, "doctor")
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


def test_without_the_native_extension_the_answer_is_no() -> None:
    done = run_without({"qkern._native"}, "doctor")
    assert done.returncode == 3, done.stderr
    assert "native extension missing" in done.stdout


def test_finetune_without_its_packages_names_the_extra() -> None:
    done = run_without({"trl", "datasets"}, "finetune", "m", "d", "-o", "o")
    assert done.returncode == 5
    assert 'needs datasets, trl, not installed here: pip install "qkern[train]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_forced_body_is_told() -> None:
    code = "import sys; from qkern.cli import main; sys.exit(main(['doctor']))"
    environment = {"QKERN_SIMD": "scalar", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "forced by QKERN_SIMD=scalar" in done.stdout


@pytest.mark.parametrize(
    ("capability", "by"), [((7, 5), "torch operations"), ((8, 0), "Triton"), ((9, 0), "Triton")]
)
def test_what_is_said_of_a_gpu_is_what_the_operators_do(
    capability: tuple[int, int], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkern.kernels._capability", lambda _: capability)
    monkeypatch.setattr("qkern.kernels._has_triton", lambda: True)
    paths = doctor._gpu_paths({"name": "a GPU", "why": ""}, native=object(), problem="")
    runs = {path["operation"]: path["path"] for path in paths}
    assert runs == dict.fromkeys(("quantize", "dequantize", "linear"), by)


def test_nothing_runs_on_a_gpu_without_the_native_extension() -> None:
    paths = doctor._gpu_paths({"name": "a GPU", "why": ""}, native=None, problem="missing")
    assert {(path["path"], path["why"]) for path in paths} == {("nothing", "missing")}


def test_the_bitsandbytes_plugin_is_announced(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = bitsandbytes.Status("0.50.2", True, "QKERN_BITSANDBYTES=1", ("gemm_4bit",))
    for is_on, word in ((True, "on: QKERN_BITSANDBYTES=1"), (False, "off: QKERN_BITSANDBYTES=1")):
        monkeypatch.setattr(bitsandbytes, "status", lambda on=is_on: state._replace(is_on=on))
        assert main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert word in text
        assert ("bitsandbytes::gemm_4bit" in text) is is_on
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["bitsandbytes plug-in"]
    assert report["operators"] == ["bitsandbytes::gemm_4bit"]
    assert not report["on"]
