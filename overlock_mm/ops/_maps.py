import torch

from ._reference import is_channels_last  # noqa: F401

HAS_FAST_BFLOAT16: bool = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()
