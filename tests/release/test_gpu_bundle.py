"""What is brought to a machine with a GPU: wheels cut to what it needs, the script that runs."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
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
