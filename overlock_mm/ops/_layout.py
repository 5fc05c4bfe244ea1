"""How maps lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is channels_last where that can be told from contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
