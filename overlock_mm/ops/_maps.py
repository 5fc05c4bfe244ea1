"""What the operators take for a map, and how it lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: Of the maps that the operators take.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Whether this processor computes in bfloat16. oneDNN takes that from AVX-512 on, and is up to 50 times slower without.
#: (torch < 2.6 does not tell: there all goes through float32.)
HAS_FAST_BFLOAT16: bool = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is channels_last where that can be told from contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
