"""What a kernel file says about itself to the compilation ahead of time, ``make aot``.

A kernel file lists the launches that it ships in ``aot_specs(arch)``; a file of ``qkern.kernels``
with a function of this name takes part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from qkern.kernels import dispatch

# NVIDIA by capability, AMD by name. "gfx942" has wavefronts of 64.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")


@dataclasses.dataclass(frozen=True)
class AotSpec:
    """A launch to compile without its device.

    Args:
        name: of the line in the table.
        kernel: the ``triton.jit`` function.
        signature: type of each run-time argument, as Triton writes them ("*bf16", "i32"), a tuple
            of types for a tuple; pointers and those of ``divisible`` count as multiples of 16.
        constants: value of each constexpr argument.
        warps: of a program.
        stages: of the pipelined loop.
        divisible: run-time arguments that are multiples of 16.
        exact: the weight's bytes are promised: products are not fused into sums, and no
            ``fma.rn.f32`` and no ``div.full`` may be in its PTX.
        tensor_cores: HGMMA, HMMA or MFMA must be in the machine code.
        quick: part of ``make test``.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
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


def is_quick(arch: str, op: str) -> bool:
    """Whether `make test` compiles an operation for ``arch``: of most, one is enough."""
    return arch in {"sm_80", "sm_90"} or op == "matmul"


def product_specs(
    op: str, kernel: Any, arch: str, *, exact: bool = True, more: dict[str, str] | None = None
) -> Iterator[AotSpec]:
    """The rows of ``arch``'s table for ``op``: NF4 in bf16, and what else changes the code.

    Args:
        op: of the rows.
        kernel: the function; its constants are found by name.
        arch: of ``ARCHS``.
        exact: of the specs with 16-bit activations.
        more: types of run-time arguments that other products do not have.
    """
    ops = {op, "matmul"} if op == "matmul_small" else {op}  # large tiles may be split too
    rows = [row for row in dispatch.table(dispatch.family(arch)) if row.op in ops]
    kinds = [("nf4", "bf16", "bf16", 16)]
    for i, row in enumerate(rows):
        if row.bits == 32:
            each = [("nf4", "fp32", "fp32", 16)]
        elif i == 0:
            each = [
                *kinds,
                ("nf4", "fp16", "fp16", 16),
                ("nf4", "bf16", "fp32", 16),
                ("nf4", "bf16", "bf16", 0),
                ("nf4 fp32-scales", "bf16", "bf16", 64),
                ("int8", "bf16", "bf16", 16),
                ("int8 rows", "bf16", "bf16", 16),
            ]
        else:
            each = kinds
        for kind, dtype, adapter, rank in each:
            fitted = row.for_codes(8 if kind.startswith("int8") else 4)
            yield AotSpec(
                f"{op} {'x'.join(map(str, fitted.tile))} {kind} {dtype} r{rank} {adapter}",
                kernel,
                _signature(kernel, kind, dtype, adapter) | (more or {}),
                _constants(kernel, fitted, kind, dtype, rank, arch),
                warps=row.warps,
                stages=row.stages,
                divisible=("N", "K"),
                exact=exact and row.bits == 16,
                tensor_cores=op != "matvec" and row.bits == 16,
                quick=(kind, dtype, adapter, rank) == kinds[0] and is_quick(arch, op),
            )


def member_specs(
    op: str,
    kernel: Any,
    arch: str,
    count: int,
    *,
    exact: bool = True,
    more: dict[str, str] | None = None,
) -> Iterator[AotSpec]:
    """The same for ``count`` layers in one launch: NF4 in bf16, each row of the table.

    Args:
        op: of the rows.
        kernel: the function; what it has for each layer are tuples.
        arch: of ``ARCHS``.
        count: layers.
        exact: whether bytes of the weights are promised.
        more: types of other run-time arguments.
    """
    pointers = {"packed": "*u8", "absmax": "*u8", "bias": "*bf16", "B": "*bf16", "y": "*bf16"}
    pointers |= dict.fromkeys(("nested_absmax", "offset"), "*fp32")
    members = {name: (type_,) * count for name, type_ in pointers.items()}
    members |= dict.fromkeys(("rows", "ranks"), ("i32",) * count)
    for row in dispatch.table(dispatch.family(arch)):
        if row.op != op or row.bits != 16:
            continue
        common = _signature(kernel, "nf4", "bf16", "fp32") | (more or {})
        constants = _constants(kernel, row, "nf4", "bf16", 16, arch)
        constants |= {"BIASED": (1 << count) - 1}
        if "SPLIT" in kernel.arg_names:
            constants["SPLIT"] = op == "matmul_small"
        yield AotSpec(
            f"{count} x {op} {'x'.join(map(str, row.tile))} nf4 bf16 r16 bf16",
            kernel,
            common | members,
            constants,
            warps=row.warps,
            stages=row.stages,
            divisible=("K", "rows", "ranks"),
            exact=exact,
            tensor_cores=op != "matvec",
            quick=arch == "sm_90" and op == "matvec" and row.tokens == 1,
        )


def _signature(
    kernel: Any, kind: str, dtype: str, adapter: str
) -> dict[str, str | tuple[str, ...]]:
    nested = kind in {"nf4", "int8"}
    types = {
        "packed_ptr": "*i8" if kind.startswith("int8") else "*u8",
        "absmax_ptr": "*u8" if nested else "*fp32",
        "h_ptr": f"*{adapter}",
        "B_ptr": f"*{adapter}",
        **dict.fromkeys(("nested_absmax_ptr", "offset_ptr", "tables_ptr"), "*fp32"),
        **dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), f"*{dtype}"),
        **dict.fromkeys("MNK", "i32"),
    }
    return {name: types[name] for name in kernel.arg_names if name in types}


def _constants(
    kernel: Any, row: dispatch.Config, kind: str, dtype: str, rank: int, arch: str
) -> dict[str, Any]:
    BM, BN, BK = row.tile
    is_nvidia = arch.startswith("sm_")
    bits = 8 if kind.startswith("int8") else 4
    values = {
        "BITS": bits,
        "BLOCKSIZE": 0 if kind == "int8 rows" else 64,
        "DOUBLE_QUANT": kind in {"nf4", "int8"},
        "LOOKUP": lookup_of(arch),
        "HAS_BIAS": True,
        "RANK": rank,
        "BR": max(rank, 16),
        "PRECISION": "tf32x3" if is_nvidia and dtype != "fp32" else "ieee",
        "EVEN_K": True,
        "AHEAD": row.decodes_ahead(bits),
        "BM": BM,
        "BN": BN,
        "BK": BK,
        "TOKENS": row.tokens,
    }
    return {name: values[name] for name in kernel.arg_names if name in values}
