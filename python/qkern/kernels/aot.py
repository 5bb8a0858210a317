"""What a kernel file says about itself to the compilation ahead of time, ``make aot``.

A kernel file lists the launches that it ships in ``aot_specs(arch)``; a file of ``qkern.kernels``
with a function of this name takes part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# NVIDIA by capability, AMD by name. "gfx942" has wavefronts of 64.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


@dataclasses.dataclass(frozen=True)
class AotSpec:
    """A launch to compile without its device.

    Args:
        name: of the line in the table.
        kernel: the ``triton.jit`` function.
        signature: type of each run-time argument, as Triton writes them ("*bf16", "i32"); pointers
            and those of ``divisible`` count as multiples of 16.
        constants: value of each constexpr argument.
        warps: of a program.
        stages: of the pipelined loop.
        divisible: run-time arguments that are multiples of 16.
        exact: bytes are promised: no ``fma.rn.f32`` and no ``div.full`` may be in its PTX.
        tensor_cores: HGMMA, HMMA or MFMA must be in the machine code.
        quick: part of ``make test``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()
    exact: bool = True
    tensor_cores: bool = False
    quick: bool = False


def lookup_of(arch: str) -> str:
    """How kernels for ``arch`` look up 4-bit codes, see ``qkern.kernels.decode``."""
    return "shuffle" if arch.startswith("sm_") else "table"
