"""Wheels for a machine with a GPU that has no Rust and no network: ``make gpu-bundle``.

    python tests/gpu/bundle.py [--out build/gpu] [--package peft] [--python 3.12] [--cuda 130]

Takes the newest qkern wheel of ``dist``, and downloads other packages for that machine's Python,
alone: what they need must be there, or be named too. bitsandbytes' wheel is cut down to the code
for one version of CUDA. ``tests/gpu/run.sh`` installs what lies in the folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("bitsandbytes>=0.50,<0.51",)
# pip takes a wheel only for a platform that is named: all that Linux of a recent year has.
PLATFORMS = ("manylinux2014", "manylinux1", *(f"manylinux_2_{n}" for n in range(17, 40)))
LARGEST = 48 << 20  # bytes of all wheels


def qkern_wheel(dist: Path) -> Path:
    """The newest."""
    wheels = sorted(dist.glob("qkern-*-abi3-*linux*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"error: no wheel of qkern for Linux in {dist}: run `make build`")
    return wheels[-1]


def download(requirement: str, folder: Path, python: str, machine: str) -> Path:
    """One package's wheel, without what it needs."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", f"--dest={folder}"]
    command += [f"--platform={name}_{machine}" for name in PLATFORMS]
    subprocess.run([*command, requirement], check=True)
    (wheel,) = folder.iterdir()
    return wheel


def trimmed(wheel: Path, out: Path, cuda: str) -> None:
    """A copy of bitsandbytes' wheel without code for other devices and other versions of CUDA."""
    keep = {"libbitsandbytes_cpu.so", f"libbitsandbytes_cuda{cuda}.so"}

    def left_out(path: str) -> bool:
        name = path.rpartition("/")[2]
        return bool(re.fullmatch(r"libbitsandbytes_\w+\.so", name)) and name not in keep

    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        found = {path.rpartition("/")[2] for path in source.namelist()}
        if missing := keep - found:
            sys.exit(f"error: {wheel.name} has no {', '.join(missing)}: name another --cuda")
        for entry in source.infolist():
            if left_out(entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                rest = (line for line in lines if not left_out(line.partition(",")[0]))
                content = "".join(rest).encode()
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)


def main() -> None:
    """Fill the folder anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where qkern's wheel is")
    parser.add_argument("--package", action="append", default=[], help="one more, as for pip")
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--machine", default="x86_64", help="its processor")
    parser.add_argument("--cuda", default="130", help="its torch's version of CUDA, without dots")
    options = parser.parse_args()
    wheel = qkern_wheel(options.dist)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    shutil.copy(wheel, options.out)
    with tempfile.TemporaryDirectory() as folder:
        for i, requirement in enumerate((*PACKAGES, *options.package)):
            got = download(requirement, Path(folder, str(i)), options.python, options.machine)
            if got.name.startswith("bitsandbytes-"):
                trimmed(got, options.out / got.name, options.cuda)
            else:
                shutil.copy(got, options.out)
    total = 0
    for path in sorted(options.out.iterdir()):
        total += path.stat().st_size
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path}")
    if total > LARGEST:
        sys.exit(f"error: {total >> 20} MiB of wheels, {LARGEST >> 20} are meant to be the most")


if __name__ == "__main__":
    main()
