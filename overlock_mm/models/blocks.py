"""The two blocks of OverLoCK: the static one of Base-Net and Overview-Net, and the dynamic one of Focus-Net.

B images, maps of H x W positions. x has C channels, the context h and the context prior have Ch = C4 / 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import contmix
from ..ops.pooling import adaptive_avg_pool2d
from .layers import (
    GELU,
    AdaptiveAvgPool2d,
    Conv2d,
    DepthwiseConv,
    DropPath,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
    as_matrix,
)
from .reparam import DilatedReparamConv


class BasicBlock(nn.Module):
    """Residual block with one dilated re-parameterised convolution and a convolutional MLP (paper figure 3, "Basic Block").

    Args:
        channels: C of the input and the output (B, C, H, W).
        kernel_size: of the large convolution.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability of dropping the residual branch of a sample (stochastic depth).
        layer_scale: whether the shortcut has a LayerScale (stages 3 and 4).
        deploy: build the large convolution in its folded form.
    """

    def __init__(
        self, channels: int, kernel_size: int, mlp_ratio: int, drop_path: float, layer_scale: bool, deploy: bool = False
    ) -> None:
        super().__init__()
        hidden = channels * mlp_ratio
        self.dwconv = ResidualDepthwiseConv(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels),
            DilatedReparamConv(channels, kernel_size, deploy),
            nn.BatchNorm2d(channels),
            SqueezeExcitation(channels),
            Conv2d(channels, hidden, kernel_size=1),
            GELU(),
            ResidualDepthwiseConv(hidden),
            GlobalResponseNorm(hidden),
            Conv2d(hidden, channels, kernel_size=1),
            DropPath(drop_path),
        )
        self.ls = LayerScale(channels) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


class DynamicBlock(nn.Module):
    """Block of the Focus-Net: gated context mixing, then a convolutional MLP (paper section 3.2-3.3, "Dynamic Block").

    Two maps go through it: the features x and the context h, which starts as the overview of the whole image (the paper's
    context prior) and is updated on the way.

    Args:
        channels: C of x (B, C, H, W).
        context_channels: Ch of h (B, Ch, H, W).
        num_groups: G, the groups of either dynamic kernel.
        kernel_size: K of the large dynamic kernel and of the local position encoding ("lepe").
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability of dropping a residual branch of a sample (stochastic depth).
        mix_context: whether the context first takes in the context prior again (all blocks except the first).
        last: whether the output is [x, h], not split (the last block of the network).
        deploy: build the large convolution in its folded form.
    """

    small_kernel_size = 5
    context_size = 7  # S: the context is pooled to S x S tokens

    def __init__(
        self,
        channels: int,
        context_channels: int,
        num_groups: int,
        kernel_size: int,
        mlp_ratio: int,
        drop_path: float,
        mix_context: bool,
        last: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        both = channels + context_channels
        inner = channels // 2
        tokens = self.context_size**2
        self.channels = channels
        self.context_channels = context_channels
        self.num_groups = num_groups
        self.kernel_size = kernel_size
        self.query_scale = (channels // num_groups) ** -0.5
        self.last = last

        if mix_context:
            self.x_scale = LayerScale(context_channels)
            self.h_scale = LayerScale(context_channels)
        self.mix_context = mix_context
        self.dwconv1 = ResidualDepthwiseConv(both)
        self.norm1 = LayerNorm2d(both)
        self.fusion = nn.Sequential(
            DepthwiseConv(both, kernel_size=3),
            nn.BatchNorm2d(both),
            GELU(),
            Conv2d(both, channels, kernel_size=1),
            GlobalResponseNorm(channels),
        )
        self.weight_query = nn.Sequential(Conv2d(channels, inner, kernel_size=1, bias=False), nn.BatchNorm2d(inner))
        self.weight_key = nn.Sequential(
            AdaptiveAvgPool2d(self.context_size),
            Conv2d(context_channels, inner, kernel_size=1, bias=False),
            nn.BatchNorm2d(inner),
        )
        self.weight_proj = Conv2d(tokens, self.small_kernel_size**2 + kernel_size**2, kernel_size=1)
        self.rpb1 = nn.Parameter(torch.zeros(num_groups, 2 * self.small_kernel_size - 1, 2 * self.small_kernel_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(num_groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.dyconv_proj = nn.Sequential(Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels))
        self.lepe = nn.Sequential(DilatedReparamConv(channels, kernel_size, deploy), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcitation(channels)
        self.gate = nn.Sequential(
            Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
        )
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), Conv2d(channels, both, kernel_size=1))
        self.ls1 = LayerScale(both)

        hidden = channels * mlp_ratio
        self.dwconv2 = ResidualDepthwiseConv(both)
        self.norm2 = LayerNorm2d(both)
        self.mlp = nn.Sequential(
            Conv2d(both, hidden, kernel_size=1),
            GELU(),
            ResidualDepthwiseConv(hidden),
            GlobalResponseNorm(hidden),
            Conv2d(hidden, both, kernel_size=1),
        )
        self.ls2 = LayerScale(both)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, h: Tensor, prior: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Features (B, C, H, W), context and context prior (B, Ch, H, W) to (x, h), or to [x, h] from the last block."""
        if self.mix_context:
            h = self.x_scale(h) + self.h_scale(prior)  # the paper's alpha and beta
        y = self.dwconv1(torch.cat([x, h], dim=1))
        normed = self.norm1(y)
        fused = self.fusion(normed)
        mixed = self.dyconv_proj(self.contmix(fused, normed)) + self.lepe(fused)
        mixed = self.gate(fused) * self.se_layer(mixed)
        y = self.ls1(y) + self.drop_path(self.proj(mixed))
        y = self.dwconv2(y)
        y = self.ls2(y) + self.drop_path(self.mlp(self.norm2(y)))
        return y if self.last else y.split([self.channels, self.context_channels], dim=1)

    def contmix(self, fused: Tensor, normed: Tensor) -> Tensor:
        """Context mixing of ``fused`` (B, C, H, W), by kernels made from ``normed`` (B, C + Ch, H, W) (section 3.3)."""
        return mix_at_fitting_size(self._mix, self.kernel_size, fused, normed)

    def _mix(self, fused: Tensor, normed: Tensor) -> Tensor:
        x, h = normed.split([self.channels, self.context_channels], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)  # a slice of channels has a layout of its own
        query = self.weight_query(x)
        key = self.weight_key(h)
        kernel_weight, kernel_bias = as_matrix(self.weight_proj, self.context_size**2, like=self.rpb1)  # the paper's W_d
        return contmix(
            fused,
            query,
            key,
            kernel_weight,
            kernel_bias,
            self.rpb1,
            self.rpb2,
            num_groups=self.num_groups,
            small_kernel_size=self.small_kernel_size,
            large_kernel_size=self.kernel_size,
            scale=self.query_scale,
        )


def mix_at_fitting_size(mix: Callable[..., Tensor], kernel_size: int, *maps: Tensor) -> Tensor:
    """Run ContMix on maps of any size: those that cannot hold its kernel are enlarged, and the result is averaged back.

    Args:
        mix: takes ``maps``, all of one size, and gives a map of that size.
        kernel_size: of the large kernel.
        maps: each (B, *, H, W).

    Returns:
        The result of ``mix``, (B, *, H, W).
    """
    size = maps[0].shape[2:]
    if min(size) >= kernel_size:
        return mix(*maps)
    enlarged = _size_that_holds(kernel_size, *size)
    mixed = mix(*(F.interpolate(each, enlarged, mode='bilinear', align_corners=False) for each in maps))
    return adaptive_avg_pool2d(mixed, size)


def _size_that_holds(kernel_size: int, height: int, width: int) -> tuple[int, int]:
    """Size to which a map too small for the kernel is enlarged, its sides in about the same ratio.

    The floating-point products are the published ones. Rounding decides the size of maps near the kernel's. Where it gives
    one position less than the kernel (15 on 11 x 11), the kernel's size is taken.
    """
    if height < width:
        return kernel_size, max(kernel_size, math.floor(kernel_size / height * width))
    return max(kernel_size, math.floor(kernel_size / width * height)), kernel_size
