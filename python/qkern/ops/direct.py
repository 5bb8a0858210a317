"""When an operator's work may be done without going through torch's dispatcher.

The dispatcher serves gradients, tracing, profiling and modes that watch or replace operations.
Where none of these is there it takes longer than a small product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether nothing but results and gradients can tell that no operator ran on these tensors.

    Those on meta have no results.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors is to be recorded for gradients."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
