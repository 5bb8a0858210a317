"""``torch.library`` operators over plain tensors: schema, fake, autograd and the CPU kernels.

The only importer of ``kernels``. Every operator has a default implementation for other devices: by
kernels, or where there are none by torch.
"""

from qkern.ops.dequantize import (
    decoded,
    decoded_into,
    dequantize,
    has_kernels,
    parts_of_expert,
    parts_of_shard,
)
from qkern.ops.experts import Stack
from qkern.ops.grouped_linear import grouped_linear
from qkern.ops.linear import linear
from qkern.ops.lora_dropout import add_dropped, drops_in_kernel
from qkern.ops.merged import (
    adapter_gradients,
    input_gradient,
    merged_values,
    quantize_merged,
)
from qkern.ops.projections import Layer, projections, share_a_launch
from qkern.ops.quantize import (
    encode,
    has_data,
    quantize,
    quantize_absmax,
    search_scales,
    stack_to_parts,
    to_parts,
)

__all__ = [
    "Layer",
    "Stack",
    "adapter_gradients",
    "add_dropped",
    "decoded",
    "decoded_into",
    "dequantize",
    "drops_in_kernel",
    "encode",
    "grouped_linear",
    "has_data",
    "has_kernels",
    "input_gradient",
    "linear",
    "merged_values",
    "parts_of_expert",
    "parts_of_shard",
    "projections",
    "quantize",
    "quantize_absmax",
    "quantize_merged",
    "search_scales",
    "share_a_launch",
    "stack_to_parts",
    "to_parts",
]
