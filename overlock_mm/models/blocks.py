"""The two blocks of OverLoCK: the static one of Base-Net and Overview-Net, and the dynamic one of Focus-Net."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from ..ops import contmix
from .folding import conv_norm, folded_projection
from .layers import (
    DepthwiseConv,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
    batch_norm,
    gelu_mix_norm,
    is_plain,
    layer_norm,
)
from .recompute import recomputing
from .reparam import DilatedReparamConv


class BasicBlock(nn.Module):
    """Residual block with one dilated re-parameterised convolution and a convolutional MLP (paper figure 3, "Basic Block").

    Args:
        channels: C of the input and the output (B, C, H, W).
        kernel_size: of the large convolution.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability of dropping the residual branch of a sample (stochastic depth).
        layer_scale: whether the shortcut has a LayerScale (stages 3 and 4).
        deploy: build the folded form.
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
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.GELU(),
            ResidualDepthwiseConv(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, channels, kernel_size=1),
            DropPath(drop_path),
        )
        self.ls = LayerScale(channels) if layer_scale else nn.Identity()
        self.deploy = deploy

    def switch_to_deploy(self) -> None:
        self.deploy = True

    def forward(self, x: Tensor) -> Tensor:
        norm, large_conv, second_norm, attention, expand, gelu, mix, response_norm, project, drop_path = self.proj
        with recomputing() as again:
            x = again(self.dwconv, x)
            y = dilated_norm(again, large_conv, second_norm, layer_norm(again, norm, x), self.deploy)
            y = expand(again(attention, y))
            y = gelu_mix_norm(again, gelu, mix, response_norm, y)
            return add_branch(x, self.ls, project, y, drop_path)


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
        mix_context: whether the context first takes in the context prior again (all blocks but the first).
        last: whether the block gives [x, h] undivided (the last of the network).
        deploy: build the folded form.
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
        self.channels = channels
        self.context_channels = context_channels
        self.num_groups = num_groups
        self.kernel_size = kernel_size
        self.query_scale = (channels // num_groups) ** -0.5
        self.last = last

        if mix_context:
            self.x_scale = LayerScale(context_channels)  # the paper's alpha
            self.h_scale = LayerScale(context_channels)  # the paper's beta
        self.mix_context = mix_context
        self.dwconv1 = ResidualDepthwiseConv(both)
        self.norm1 = LayerNorm2d(both)
        self.fusion = nn.Sequential(
            DepthwiseConv(both, kernel_size=3),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, channels, kernel_size=1),
            GlobalResponseNorm(channels),
        )
        self.weight_query = nn.Sequential(nn.Conv2d(channels, inner, kernel_size=1, bias=False), nn.BatchNorm2d(inner))
        self.weight_key = nn.Sequential(
            nn.AdaptiveAvgPool2d(self.context_size),
            nn.Conv2d(context_channels, inner, kernel_size=1, bias=False),
            nn.BatchNorm2d(inner),
        )
        # W_d, kept as a 1x1 convolution for the checkpoints' sake.
        self.weight_proj = nn.Conv2d(self.context_size**2, self.small_kernel_size**2 + kernel_size**2, kernel_size=1)
        self.rpb1 = nn.Parameter(torch.zeros(num_groups, 2 * self.small_kernel_size - 1, 2 * self.small_kernel_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(num_groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.dyconv_proj = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels))
        self.lepe = nn.Sequential(DilatedReparamConv(channels, kernel_size, deploy), nn.BatchNorm2d(channels))
        self.se_layer = SqueezeExcitation(channels)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
        )
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, both, kernel_size=1))
        self.ls1 = LayerScale(both)

        hidden = channels * mlp_ratio
        self.dwconv2 = ResidualDepthwiseConv(both)
        self.norm2 = LayerNorm2d(both)
        self.mlp = nn.Sequential(
            nn.Conv2d(both, hidden, kernel_size=1),
            nn.GELU(),
            ResidualDepthwiseConv(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, both, kernel_size=1),
        )
        self.ls2 = LayerScale(both)
        self.drop_path = DropPath(drop_path)
        self.deploy = deploy

    def switch_to_deploy(self) -> None:
        self.deploy = True

    def forward(self, x: Tensor, h: Tensor, prior: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Features (B, C, H, W), context and context prior (B, Ch, H, W) to (x, h), or to [x, h] from the last block."""
        if self.mix_context:
            h = self.x_scale(h) + self.h_scale(prior)
        with recomputing() as again:
            y = again(self.dwconv1, torch.cat([x, h], dim=1))
            mixed = self._mixer(again, layer_norm(again, self.norm1, y))
            norm, project = self.proj
            folded = folded_projection(norm, project, self.deploy)
            mixed = mixed if folded else batch_norm(again, norm, mixed)
            y = add_branch(y, self.ls1, project, mixed, self.drop_path, folded)
            y = again(self.dwconv2, y)
            expand, gelu, mix, response_norm, project = self.mlp
            z = expand(layer_norm(again, self.norm2, y))
            z = gelu_mix_norm(again, gelu, mix, response_norm, z)
            y = add_branch(y, self.ls2, project, z, self.drop_path)
        if self.last:
            return y
        x, h = y.split([self.channels, self.context_channels], dim=1)
        return x, h

    def _mixer(self, again: recomputing, normed: Tensor) -> Tensor:
        """Gated context mixing of a normalised map (B, C + Ch, H, W) to (B, C, H, W), up to the last norm."""
        conv, norm, gelu, project, response_norm = self.fusion
        fused = project(again(gelu, conv_norm(again, conv, norm, normed, self.deploy)))
        fused = again(response_norm, fused)
        mixed = mix_at_fitting_size(partial(self._mix, again), self.kernel_size, fused, normed)
        mixed = again(
            torch.add,
            conv_norm(again, *self.dyconv_proj, mixed, self.deploy),
            dilated_norm(again, *self.lepe, fused, self.deploy),
        )
        gate_conv, gate_norm, activation = self.gate
        gate = again(activation, conv_norm(again, gate_conv, gate_norm, fused, self.deploy))
        return again(torch.mul, again(self.se_layer, mixed), gate)

    def _mix(self, again: recomputing, fused: Tensor, normed: Tensor) -> Tensor:
        """Context mixing of ``fused`` (B, C, H, W) by kernels made from ``normed`` (B, C + Ch, H, W)."""
        x = again(lambda normed: normed[:, : self.channels].contiguous(memory_format=torch.channels_last), normed)
        h = again(lambda normed: normed[:, self.channels :], normed)
        query = conv_norm(again, *self.weight_query, x, self.deploy)
        pool, key_conv, key_norm = self.weight_key
        return contmix(
            fused,
            again(lambda query: query * self.query_scale, query),
            conv_norm(again, key_conv, key_norm, pool(h), self.deploy),
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            self.rpb1,
            self.rpb2,
            num_groups=self.num_groups,
            small_kernel_size=self.small_kernel_size,
            large_kernel_size=self.kernel_size,
        )


def dilated_norm(again: recomputing, conv: DilatedReparamConv, norm: nn.Module, x: Tensor, deploy: bool) -> Tensor:
    """``norm(conv(x))``."""
    folds = deploy and is_plain(conv, DilatedReparamConv) and conv.deploy
    return conv_norm(again, conv.lk_origin if folds else conv, norm, x, folds)


def add_branch(
    x: Tensor,
    scale: nn.Module,
    project: nn.Conv2d,
    y: Tensor,
    drop_path: DropPath,
    weights: Optional[tuple[Tensor, Tensor]] = None,
) -> Tensor:
    """``scale(x) + drop_path(project(y))`` with a LayerScale or nothing for ``scale``.

    ``weights`` are a weight and a bias in place of those of ``project``.
    """
    dropped = drop_path.training and drop_path.drop_prob > 0
    if dropped or not is_plain(scale, LayerScale) or not is_plain(project, nn.Conv2d):
        branch = F.conv2d(y, *weights) if weights else project(y)
        return scale(x) + drop_path(branch)
    # The scale's shift goes along with the projection's bias, the scaling with the sum.
    weight, bias = weights or (project.weight, project.bias)
    branch = F.conv2d(y, weight, bias + scale.bias)
    return torch.addcmul(branch, x, scale.weight.view(1, -1, 1, 1).to(x.dtype))


def mix_at_fitting_size(mix: Callable[..., Tensor], kernel_size: int, *maps: Tensor) -> Tensor:
    """Run ContMix on maps of any size: those that cannot hold its kernel are enlarged, and the result is averaged back.

    Args:
        mix: takes ``maps``, all of one size, and gives a map of that size.
        kernel_size: of the large kernel.
        maps: each (B, *, H, W).

    Returns:
        What ``mix`` gives, (B, *, H, W).
    """
    size = maps[0].shape[2:]
    if min(size) >= kernel_size:
        return mix(*maps)
    enlarged = _size_that_holds(kernel_size, *size)
    mixed = mix(*(F.interpolate(each, enlarged, mode='bilinear', align_corners=False) for each in maps))
    return F.adaptive_avg_pool2d(mixed, size)


def _size_that_holds(kernel_size: int, height: int, width: int) -> tuple[int, int]:
    """Size to which a map too small for the kernel is enlarged, its sides in about the same ratio.

    The floating-point products are the published ones and decide the size of maps near the kernel's. They may fall one
    short of the kernel (15 on 11 x 11), which the kernel cannot.
    """
    if height < width:
        return kernel_size, max(kernel_size, math.floor(kernel_size / height * width))
    return max(kernel_size, math.floor(kernel_size / width * height)), kernel_size
