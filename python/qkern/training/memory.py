"""The highest memory use of this process so far."""

from __future__ import annotations

import sys
from typing import Any


def peak_memory(device: Any = "cpu") -> int:
    """Bytes: of tensors on a GPU, of the whole process (resident) otherwise; 0 if unknown.

    Args:
        device: a torch device or its name.
    """
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
