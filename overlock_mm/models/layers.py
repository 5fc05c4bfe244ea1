"""Small layers of OverLoCK, with the parameter names of the released checkpoints."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W), at every position on its own."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learnt scale and shift per channel: ``x * weight + bias``.

    Args:
        channels: C of the input (B, C, H, W).
        init_value: what every weight starts at; the bias starts at 0.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # (C, 1, 1, 1) is the checkpoints' shape: the release runs it as a depth-wise 1x1 convolution.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), float(init_value)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Parameters follow the input's dtype, so that autocast keeps the residual stream in half precision.
        weight = self.weight.view(1, -1, 1, 1).to(x.dtype)
        return torch.addcmul(self.bias.view(1, -1, 1, 1).to(x.dtype), x, weight)


class ResidualDepthwiseConv(nn.Conv2d):
    """``x + depth-wise 3x3 convolution of x``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SqueezeExcitation(nn.Module):
    """Channel attention from the global mean (Hu et al., CVPR 2018), with at least 16 hidden channels."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(16, channels // reduction)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of (B, C, H, W) (Woo et al., ConvNeXt V2, eq. 1-3); the identity at the start."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # A sum of squares over a map leaves float16's range at ordinary activations: at least float32 here.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
        response = response / (response.mean(dim=1, keepdim=True) + self.eps)
        scale = (self.gamma * response + 1).to(x.dtype)
        return torch.addcmul(self.beta.to(x.dtype), x, scale)
