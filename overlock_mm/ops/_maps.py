"""What the operators take for a map, and how it lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of the maps that the operators take.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is channels_last where that can be told from contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
