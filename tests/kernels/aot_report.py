"""Compile the shipped kernels for GPUs that need not be there; their machine code must hold gates.

    python tests/kernels/aot_report.py [--quick] [--arch sm_90 ...] [--name matmul]

Prints a line per kernel and architecture. Fails on a spilled register, on more shared memory than
there is, on tensor cores that were asked for and are not used, on products that the assembler
serializes, and, in kernels that promise bytes, on a fused product, an inexact division or subnormal
numbers taken as zeros. Needs triton, which brings the disassembler. What an old one cannot compile
is left out, and named.

loop: instructions of the longest loop. mma: tensor-core instructions in the whole kernel.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkern import kernels
from qkern.kernels.aot import ARCHS, AotSpec
from qkern.kernels.launch import TAKES_TUPLES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = ("registers", "spills", "shared", "mma", "shfl", "loop", "code")
# Triton 3.2 has no assembler for these.
NEWER_ARCHS = ("sm_120", "gfx942")
# Bytes of shared memory that a program can have; a launch that wants more fails.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 << 10)
# ptxas: wgmma is made to wait after each instruction.
SERIALIZED = ("C7510", "C7515")
HEAD = f"{'kernel':56s} {'arch':7s}" + "".join(f"{name:>10s}" for name in COLUMNS) + "     s"


class Code(NamedTuple):
    """What a compiled kernel is made of."""

    registers: int
    spills: int
    shared: int
    mma: int
    shfl: int
    loop: int
    code: int
    notes: tuple[str, ...]


def shipped(arch: str) -> Iterator[AotSpec]:
    """The specs of every kernel file."""
    for found in pkgutil.iter_modules(kernels.__path__, "qkern.kernels."):
        module = importlib.import_module(found.name)
        if hasattr(module, "aot_specs"):
            yield from module.aot_specs(arch)


def left_out(spec: AotSpec, arch: str) -> str:
    """Why this Triton cannot compile a spec; empty if it can."""
    if TAKES_TUPLES:
        return ""
    if arch in NEWER_ARCHS:
        return f"this Triton has no assembler for {arch} :"
    if any(isinstance(kind, tuple) for kind in spec.signature.values()):
        return f"this Triton takes no tuple of tensors, {arch} :"
    return ""


def target_of(arch: str) -> GPUTarget:
    """Triton's name for an architecture of ``ARCHS``."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def places(index: int, kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Path and type of an argument, or of each entry of a tuple."""
    if isinstance(kind, tuple):
        return [((index, i), each) for i, each in enumerate(kind)]
    return [((index,), kind)]


def compile_spec(spec: AotSpec, arch: str) -> Any:
    """The compiled kernel."""
    names = spec.kernel.arg_names
    missing = set(names) ^ {*spec.signature, *spec.constants}
    assert not missing, f"{spec.name}: {sorted(missing)} are in the kernel or the spec alone"
    signature = {n: "constexpr" if n in spec.constants else spec.signature[n] for n in names}
    aligned = [
        place
        for i, n in enumerate(names)
        for place, kind in places(i, signature[n])
        if kind.startswith("*") or n in spec.divisible
    ]
    if TAKES_TUPLES:
        source = ASTSource(
            spec.kernel,
            signature,
            {(i,): spec.constants[n] for i, n in enumerate(names) if n in spec.constants},
            {place: [["tt.divisibility", 16]] for place in aligned},
        )
    else:
        from triton.backends.compiler import AttrsDescriptor

        types = {n: kind for n, kind in signature.items() if kind != "constexpr"}
        hints = AttrsDescriptor.from_hints({i: 16 for (i,) in aligned})
        source = ASTSource(spec.kernel, types, dict(spec.constants), hints)
    options = {
        "num_warps": spec.warps,
        "num_stages": spec.stages,
        "enable_fp_fusion": not spec.exact,
    }
    return triton.compile(source, target_of(arch), options)


def read_nvidia(compiled: Any, arch: str) -> Code:
    """From the cubin: what its header says, and its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(TOOLS / "cuobjdump", "-res-usage", cubin)
        sass = run(TOOLS / "nvdisasm", "-c", cubin)
        notes: list[str] = []
        if "wgmma" in compiled.asm["ptx"]:  # the notes are not in the log of a usual compilation
            ptx.write_text(compiled.asm["ptx"])
            notes = re.findall(r"\((C75\d\d)\)", assemble(ptx, arch))
    operations, targets = [], {}
    branches = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            targets[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            if branch := re.search(r"BRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)", line):
                branches.append((len(operations), branch[1]))
            operations.append(found[1].split(".")[0])
    loops = [at - targets[to] for at, to in branches if targets.get(to, at) < at]
    return Code(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(operation in {"LDL", "STL"} for operation in operations),
        shared=compiled.metadata.shared,
        mma=sum(operation in {"HGMMA", "HMMA", "IGMMA", "OMMA"} for operation in operations),
        shfl=operations.count("SHFL"),
        loop=max(loops, default=0),
        code=len(operations),
        notes=tuple(sorted(set(notes))),
    )


def read_amd(compiled: Any) -> Code:
    """From the assembly and its metadata."""
    text = compiled.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    lines = [line.strip() for line in text.splitlines()]
    operations = [re.match(r"[a-z]+_\w+", line) for line in lines if re.match(r"[sv]_|ds_", line)]
    names = [found[0] for found in operations if found]
    labels = ((i, re.match(r"(\.LBB\w+):", line)) for i, line in enumerate(lines))
    places = {found[1]: i for i, found in labels if found}
    jumps = [(i, line.split()[-1]) for i, line in enumerate(lines) if "branch" in line]
    return Code(
        registers=numbers.get("vgpr_count", 0),
        spills=numbers.get("vgpr_spill_count", 0),
        shared=compiled.metadata.shared,
        mma=sum(name.startswith("v_mfma") for name in names),
        shfl=0,
        loop=max((i - places[to] for i, to in jumps if places.get(to, i) < i), default=0),
        code=len(names),
        notes=(),
    )


def assemble(ptx: Path, arch: str) -> str:
    """What the assembler says about a file, by the first that knows its version of PTX."""
    logs = []
    for name in ("ptxas", "ptxas-blackwell"):
        if (TOOLS / name).exists():
            command = (TOOLS / name, "-v", f"--gpu-name={arch}a", ptx, "-o", os.devnull)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout + done.stderr
            logs.append(done.stderr)
    raise RuntimeError("\n".join(logs))


def run(*command: str | Path) -> str:
    """What a tool prints, on either stream."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def failures(spec: AotSpec, code: Code, text: str, arch: str) -> Iterator[str]:
    """Which gates do not hold; ``text`` is the PTX, or AMD's assembly."""
    if code.spills:
        yield f"{code.spills} spills"
    if code.shared > SHARED[arch]:
        yield f"{code.shared} bytes of shared memory, {SHARED[arch]} are there"
    if spec.tensor_cores and not code.mma:
        yield "no tensor-core instruction"
    if serialized := set(code.notes) & set(SERIALIZED):
        yield f"serialized by the assembler, {sorted(serialized)}"
    if spec.exact:
        found = inexact_amd(text) if arch.startswith("gfx") else inexact_nvidia(text)
        yield from (f"{each} in a kernel that promises bytes" for each in found)


def inexact_nvidia(ptx: str) -> Iterator[str]:
    """What rounds otherwise than its source says."""
    yield from (each for each in ("fma.rn.f32", "div.full", ".ftz") if each in ptx)


def inexact_amd(assembly: str) -> Iterator[str]:
    """The same. A division is a reciprocal, five fused products and ``v_div_fixup``."""
    operation = re.compile(
        r"^\s*(v_(?:pk_)?(?:fma|mad|mac|rcp|div_fixup|cvt_f32_u32)\w*) (.*)", re.M
    )
    names = []
    for name, operands in operation.findall(assembly):
        # A product that is rounded to fp16 adds -0; in Triton 3.6 it adds 0, so that -0 becomes 0,
        # which no sum tells apart. Kernels that store weights have none of these.
        if not ("_mix" in name and operands.endswith((", neg(0)", ", 0"))):
            names.append(name)
    divisions = sum(name.startswith("v_div_fixup") for name in names)
    fused = [name for name in names if re.match(r"v_(pk_)?(fma|mad|mac)\w*_f\d", name)]
    if len(fused) > 5 * divisions:
        yield f"fused products {sorted(set(fused))}"
    of_integers = sum(name.startswith("v_cvt_f32_u32") for name in names)
    if sum(name.startswith("v_rcp") for name in names) > divisions + of_integers:
        yield "an inexact division"
    for mode in ("32", "16_64"):
        if f".amdhsa_float_denorm_mode_{mode} 3" not in assembly:
            yield f"mode {mode}: subnormal numbers as zeros"


def check(spec: AotSpec, arch: str) -> bool:
    """Compile one kernel, print its line, and say whether its gates hold."""
    start = time.perf_counter()
    compiled = compile_spec(spec, arch)
    is_amd = arch.startswith("gfx")
    code = read_amd(compiled) if is_amd else read_nvidia(compiled, arch)
    seconds = time.perf_counter() - start
    values = "".join(f"{getattr(code, name):10d}" for name in COLUMNS)
    print(f"{spec.name:56s} {arch:7s}{values}{seconds:6.1f}", flush=True)
    broken = list(failures(spec, code, compiled.asm["amdgcn" if is_amd else "ptx"], arch))
    for failure in broken:
        print(f"FAILED: {spec.name} {arch}: {failure}", flush=True)
    return not broken


def main(arguments: Sequence[str] | None = None) -> int:
    """The table; 1 if a gate does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the part that `make test` runs")
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--name", default="", help="kernels whose name has this text")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: what is interpreted cannot be compiled; unset it")
    print(f"triton {triton.__version__}\n{HEAD}")
    results = []
    omitted: Counter[str] = Counter()
    for arch in chosen.arch:
        for spec in shipped(arch):
            if chosen.name not in spec.name or (chosen.quick and not spec.quick):
                continue
            if reason := left_out(spec, arch):
                omitted[reason] += 1
            else:
                results.append(check(spec, arch))
    for reason, count in omitted.items():
        print(f"left out: {reason} {count}")
    print(f"compiled: {len(results)}, failed: {results.count(False)}")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
