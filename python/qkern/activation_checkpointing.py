"""Which of torch's activation checkpointing a call is a part of."""

from __future__ import annotations

import sys
from types import FrameType

import torch.utils.checkpoint


def innermost_checkpoint(*_: object) -> FrameType | None:
    """The call of torch's checkpointing that this is a part of, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame
