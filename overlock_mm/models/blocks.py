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
from ..ops._autocast import cast_as_autocast
from ..ops._packed import can_pack
from .convolutions import add_convolved, add_projected, convolve, is_pointwise, packed_conv
from .layers import (
    DepthwiseConv,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
    batch_norm,
    can_join,
    gelu_mix_norm,
    is_plain,
    is_plain_gelu,
    layer_norm,
    mix_norm,
)
from .recompute import all_modules_have_hooks, has_hooks, recomputing
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
        inplace = self.deploy and can_pack(x)  # what nobody holds is overwritten
        with recomputing() as again:
            x = convolve(again, self.dwconv, x, deploy=self.deploy)
            y = dilated_norm(again, large_conv, second_norm, layer_norm(again, norm, x), self.deploy)
            y = attend(again, attention, y, inplace and nobody_holds(large_conv, second_norm, attention))
            y = hidden(again, expand, gelu, mix, response_norm, y, self.deploy)
            owned = inplace and nobody_holds(self.dwconv, norm)
            return add_branch(again, x, self.ls, project, y, drop_path, deploy=self.deploy, inplace=owned)


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
        inplace = self.deploy and can_pack(x)  # what nobody holds is overwritten
        with recomputing() as again:
            y = convolve(again, self.dwconv1, torch.cat([x, h], dim=1), deploy=self.deploy)
            mixed = self._mixer(again, layer_norm(again, self.norm1, y), inplace)
            norm, project = self.proj
            owned = inplace and nobody_holds(self.dwconv1, self.norm1)
            y = add_branch(again, y, self.ls1, project, mixed, self.drop_path, norm, self.deploy, owned)
            y = convolve(again, self.dwconv2, y, deploy=self.deploy)
            expand, gelu, mix, response_norm, project = self.mlp
            z = hidden(again, expand, gelu, mix, response_norm, layer_norm(again, self.norm2, y), self.deploy)
            owned = inplace and nobody_holds(self.dwconv2, self.norm2)
            y = add_branch(again, y, self.ls2, project, z, self.drop_path, None, self.deploy, owned)
        if self.last:
            return y
        x, h = y.split([self.channels, self.context_channels], dim=1)
        return x, h

    def _mixer(self, again: recomputing, normed: Tensor, inplace: bool) -> Tensor:
        """Gated context mixing of a normalised map (B, C + Ch, H, W) to (B, C, H, W), up to the last norm."""
        conv, norm, gelu, project, response_norm = self.fusion
        fused = convolve(again, project, convolve(again, conv, normed, norm, gelu, self.deploy), deploy=self.deploy)
        fused = again(response_norm, fused)
        mixed = mix_at_fitting_size(partial(self._mix, again), self.kernel_size, fused, normed)
        local = dilated_norm(again, *self.lepe, fused, self.deploy)
        conv, norm = self.dyconv_proj
        owned = inplace and nobody_holds(*self.lepe)
        mixed = add_convolved(again, local, conv, mixed, norm, self.deploy, owned)
        gate_conv, gate_norm, activation = self.gate
        gate = convolve(again, gate_conv, fused, gate_norm, activation, self.deploy)
        owned = owned and nobody_holds(self.se_layer)
        mixed = attend(again, self.se_layer, mixed, owned)
        return mixed.mul_(gate) if owned else again(torch.mul, mixed, gate)

    def _mix(self, again: recomputing, fused: Tensor, normed: Tensor) -> Tensor:
        """Context mixing of ``fused`` (B, C, H, W) by kernels made from ``normed`` (B, C + Ch, H, W)."""
        x = again(lambda normed: normed[:, : self.channels].contiguous(memory_format=torch.channels_last), normed)
        h = again(lambda normed: normed[:, self.channels :], normed)
        query_conv, query_norm = self.weight_query
        query = convolve(again, query_conv, x, query_norm, deploy=self.deploy)
        pool, key_conv, key_norm = self.weight_key
        return contmix(
            fused,
            again(lambda query: query * self.query_scale, query),
            convolve(again, key_conv, pool(h), key_norm, deploy=self.deploy),
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
    return convolve(again, conv.lk_origin if folds else conv, x, norm, deploy=folds)


def nobody_holds(*layers: nn.Module) -> bool:
    """Whether a map that these layers, and no others, make or read is nobody else's: they are ours, and without hooks."""
    ours = (ResidualDepthwiseConv, DilatedReparamConv, nn.BatchNorm2d, LayerNorm2d, SqueezeExcitation)
    return not all_modules_have_hooks() and all(type(layer) in ours and not has_hooks(layer) for layer in layers)


def attend(again: recomputing, attention: SqueezeExcitation, x: Tensor, inplace: bool) -> Tensor:
    """``attention(x)``, in the place of ``x`` where it may be."""
    return attention(x, inplace=True) if inplace else again(attention, x)


def hidden(
    again: recomputing,
    expand: nn.Conv2d,
    gelu: nn.Module,
    mix: nn.Module,
    norm: nn.Module,
    x: Tensor,
    deploy: bool,
) -> Tensor:
    """``norm(mix(gelu(expand(x))))``, the hidden map of an MLP."""
    packed = packed_conv(expand, x, deploy=deploy)
    if packed and is_plain_gelu(gelu) and can_join(mix, norm, x):
        return mix_norm(mix, norm, packed(cast_as_autocast(x), 'gelu'), inplace=True)
    return gelu_mix_norm(again, gelu, mix, norm, convolve(again, expand, x, deploy=deploy))


def add_branch(
    again: recomputing,
    x: Tensor,
    scale: nn.Module,
    project: nn.Conv2d,
    y: Tensor,
    drop_path: DropPath,
    norm: Optional[nn.Module] = None,
    deploy: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``scale(x) + drop_path(project(norm(y)))`` with a LayerScale or nothing for ``scale``; ``inplace``: over x."""
    dropped = has_hooks(drop_path) or (drop_path.training and drop_path.drop_prob > 0)
    if dropped or not is_pointwise(project) or not (is_plain(scale, LayerScale) or is_plain(scale, nn.Identity)):
        return scale(x) + drop_path(convolve(again, project, y if norm is None else batch_norm(again, norm, y)))
    if isinstance(scale, nn.Identity):
        return add_projected(again, x, project, y, norm, deploy, inplace)
    # The scale's shift goes along with the projection's bias, the scaling with the sum.
    return add_projected(again, x, project, y, norm, deploy, inplace, scale.weight.flatten(), scale.bias)


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
