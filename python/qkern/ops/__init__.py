"""``torch.library`` operators over plain tensors: schema, fake, autograd and the CPU kernels.

The only importer of ``kernels``. Every operator has the readable fallback of ``reference`` as its
default implementation, for devices that have no kernels of their own.
"""

from qkern.ops.dequantize import decoded, dequantize
from qkern.ops.linear import linear
from qkern.ops.quantize import (
    encode,
    has_data,
    quantize,
    quantize_absmax,
    search_scales,
    to_parts,
)

__all__ = [
    "decoded",
    "dequantize",
    "encode",
    "has_data",
    "linear",
    "quantize",
    "quantize_absmax",
    "search_scales",
    "to_parts",
]
