"""Which formats and dtypes a test runs over."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# (quant_type, double_quant): all kinds, with both kinds of scale where there are two.
FORMATS = [
    ("nf4", True),
    ("nf4", False),
    ("fp4", True),
    ("int8", True),
    ("int8", False),
    ("int8_row", False),
]
# One of 4 bits with scales of two levels, one of 8 bits whose blocks are rows.
KINDS = ["nf4", "int8_row"]
# Those in blocks.
QUANT_TYPES = ("nf4", "fp4", "int8")
