"""What is brought to a machine with a GPU: wheels cut to what it needs, the script that runs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "gpu"


@pytest.fixture
def bundle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle", FOLDER / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_keeps_the_code_for_one_version_of_cuda(bundle: ModuleType, tmp_path: Path) -> None:
    kept = {"b/__init__.py", "b/libbitsandbytes_cpu.so", "b/libbitsandbytes_cuda130.so"}
    gone = {"b/libbitsandbytes_cuda118.so", "b/libbitsandbytes_rocm72.so"}
    record = "b-1.dist-info/RECORD"
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        for name in sorted(kept | gone):
            wheel.writestr(name, name * 100)
        wheel.writestr(record, "".join(f"{name},sha256=0,1\n" for name in [*kept, *gone, record]))
    bundle.trimmed(tmp_path / "b.whl", tmp_path / "small.whl", "130")
    with zipfile.ZipFile(tmp_path / "small.whl") as wheel:
        assert set(wheel.namelist()) == kept | {record}
        rows = csv.reader(wheel.read(record).decode().splitlines())
        assert {row[0] for row in rows} == kept | {record}
        assert all(wheel.read(name).decode() == name * 100 for name in kept)
    with pytest.raises(SystemExit, match=r"no libbitsandbytes_cuda999\.so"):
        bundle.trimmed(tmp_path / "b.whl", tmp_path / "none.whl", "999")


def test_the_newest_wheel_is_taken_and_none_is_an_error(bundle: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `make build`"):
        bundle.qkern_wheel(tmp_path)
    for age, version in enumerate(("0.2.0", "0.1.0")):
        path = tmp_path / f"qkern-{version}-cp310-abi3-manylinux_2_34_x86_64.whl"
        path.touch()
        os.utime(path, (100 - age, 100 - age))
    assert bundle.qkern_wheel(tmp_path).name.startswith("qkern-0.2.0-")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_names_its_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "nonsense"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OUT": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert "no part 'nonsense': there are test, sanitize, bench" in done.stderr


TESTS = """
import time
import gpu_outcomes
import pytest

BROKEN = []
gpu_outcomes.lost = lambda: "broken" if BROKEN else ""

def test_that_breaks_the_device():
    BROKEN.append(1)
    assert False, "out of bounds"

def test_that_hangs():
    time.sleep(300)

@pytest.mark.parametrize("i", range(20))
def test_of_something_else(i):
    assert not BROKEN
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_lost_device_and_a_test_that_hangs_cost_no_other_test(tmp_path: Path) -> None:
    """Results are written as they come, and what was compiled comes back without its texts."""
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    cache, out = tmp_path / "cache" / "kernel", tmp_path / "out"
    cache.mkdir(parents=True)
    for suffix in ("cubin", "json", "ptx", "ttir", "source"):
        (cache / f"kernel.{suffix}").touch()
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "test"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"OUT": str(out), "TRITON_CACHE_DIR": str(cache.parent), "GPU_PYTHON": sys.executable}
        | {"QKERN_TEST_DEVICE": "cpu", "TEST_ARGS": str(tmp_path / "test_some.py")}
        | {"WORKERS": "2", "TEST_TIMEOUT": "3", "LIMIT": "200"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [json.loads(line) for line in (out / "test-gpu.jsonl").read_text().splitlines()]
    passed = {line["test"].rpartition("::")[2] for line in lines if line["outcome"] == "passed"}
    assert passed == {f"test_of_something_else[{i}]" for i in range(20)}
    texts = {line["test"].rpartition("::")[2]: line["text"] for line in lines if "text" in line}
    assert texts.keys() == {"test_that_breaks_the_device", "test_that_hangs"}
    assert any("out of bounds" in line.get("text", "") for line in lines)
    assert "test_that_hangs" in (out / "test-gpu.log").read_text()
    with tarfile.open(out / "triton-cache.tgz") as archive:
        kept = {Path(name).name for name in archive.getnames()}
    assert {"kernel.cubin", "kernel.json"} <= kept
    assert not {"kernel.ptx", "kernel.ttir", "kernel.source"} & kept
