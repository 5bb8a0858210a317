"""Compile the kernels for GPUs that need not be there; run by test_kernels.py in its own process.

Prints a line per kernel and target. Kernels that promise bytes must not fuse a product into a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkern.kernels import dequantize

CAPABILITIES = (80, 86, 89, 90, 120)
# bits, double_quant, blocksize; the last are int8 rows
KINDS = ((4, True, 64), (4, False, 64), (8, True, 64), (8, False, 172))


def main() -> None:
    """Every format kind on every target."""
    for capability in CAPABILITIES:
        for bits, double_quant, blocksize in KINDS:
            signature = {
                "packed_ptr": "*u8" if bits == 4 else "*i8",
                "absmax_ptr": "*u8" if double_quant else "*fp32",
                "nested_code_ptr": "*fp32",
                "nested_absmax_ptr": "*fp32",
                "offset_ptr": "*fp32",
                "code_ptr": "*fp32",
                "out_ptr": "*bf16",
                "numel": "i64",
                "stored": "i64",
            }
            constants = {
                "BLOCKSIZE": blocksize,
                "GROUP": 256,
                "DOUBLE_QUANT": double_quant,
                "BITS": bits,
                "DTYPE": tl.bfloat16,
                "BLOCK": dequantize.BLOCK,
            }
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(dequantize._dequantize_kernel, signature, constants)
            compiled = triton.compile(
                source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False}
            )
            ptx = compiled.asm["ptx"]
            assert "fma.rn.f32" not in ptx, "a product was fused into a sum"
            assert "div.full" not in ptx
            kind = f"{bits}-bit blocksize={blocksize} double_quant={double_quant}"
            print(f"compiled: dequantize {kind} sm_{capability}")


if __name__ == "__main__":
    main()
