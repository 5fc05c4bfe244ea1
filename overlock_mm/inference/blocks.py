"""The blocks of OverLoCK for inference: norms, scales and branches folded into convolutions, maps overwritten in place.

They have the equations of overlock_mm.models.blocks, with copies of its weights. A block owns the maps that it makes, and
may overwrite them. It does not change its inputs.
"""

from __future__ import annotations

from typing import Union

import torch
import torch.nn as nn
from torch import Tensor

from ..models.blocks import BasicBlock, DynamicBlock, mix_at_fitting_size
from ..models.layers import GlobalResponseNorm, LayerScale, ResidualDepthwiseConv, SqueezeExcitation, as_matrix
from ..ops import contmix, residual_depthwise_norm
from ..ops._autocast import autocast_disabled
from .convolution import FoldedConv2d, fold_sequence


class FoldedBasicBlock(nn.Module):
    """A :class:`BasicBlock` at inference."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        norm, large_conv, second_norm, attention, expand, _, mix, response_norm, project, _ = block.proj
        self.dwconv = FoldedConv2d(block.dwconv)
        self.norm = norm
        self.large_conv = FoldedConv2d(large_conv, second_norm)
        self.attention = Attention(attention)
        self.mlp = HiddenMap(expand, mix, response_norm)
        self.project = ScaledSum(block.ls, FoldedConv2d(project, scale=block.ls))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        y = self.attention(self.large_conv(self.norm(x)))
        return self.project(x, self.mlp(y))


class FoldedDynamicBlock(nn.Module):
    """A :class:`DynamicBlock` at inference."""

    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.split_sizes = [block.channels, block.context_channels]
        self.last = block.last
        self.mix_context = block.mix_context
        if block.mix_context:
            self.x_scale, self.h_scale = block.x_scale, block.h_scale
        self.dwconv1 = FoldedConv2d(block.dwconv1)
        self.norm1 = block.norm1
        self.fusion = fold_sequence(block.fusion)
        self.contmix = FoldedContMix(block)
        self.lepe = FoldedConv2d(*block.lepe)
        self.dyconv_proj = FoldedConv2d(*block.dyconv_proj)
        self.se_layer = Attention(block.se_layer)
        self.gate = fold_sequence(block.gate)
        norm, project = block.proj
        self.project1 = ScaledSum(block.ls1, FoldedConv2d(project, norm_before=norm, scale=block.ls1))
        self.dwconv2 = FoldedConv2d(block.dwconv2)
        self.norm2 = block.norm2
        expand, _, mix, response_norm, project = block.mlp
        self.mlp = HiddenMap(expand, mix, response_norm)
        self.project2 = ScaledSum(block.ls2, FoldedConv2d(project, scale=block.ls2))

    def forward(self, x: Tensor, h: Tensor, prior: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        if self.mix_context:
            h = self.x_scale(h) + self.h_scale(prior)
        y = self.dwconv1(torch.cat([x, h], dim=1))
        normed = self.norm1(y)
        fused = self.fusion(normed)
        mixed = self.dyconv_proj.add_to(self.lepe(fused), self.contmix(fused, normed))
        mixed = self.se_layer(mixed).mul_(self.gate(fused))
        y = self.dwconv2(self.project1(y, mixed))
        y = self.project2(y, self.mlp(self.norm2(y)))
        return y if self.last else y.split(self.split_sizes, dim=1)


class FoldedContMix(nn.Module):
    """The context mixing of a :class:`DynamicBlock` at inference."""

    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.split_sizes = [block.channels, block.context_channels]
        self.settings = dict(
            num_groups=block.num_groups,
            small_kernel_size=block.small_kernel_size,
            large_kernel_size=block.kernel_size,
            scale=block.query_scale,
        )
        self.query = FoldedConv2d(*block.weight_query)
        self.key = fold_sequence(block.weight_key)
        weight, bias = as_matrix(block.weight_proj, block.context_size**2, like=block.rpb1)
        for name, tensor in dict(kernel_weight=weight, kernel_bias=bias, rpb1=block.rpb1, rpb2=block.rpb2).items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, fused: Tensor, normed: Tensor) -> Tensor:
        return mix_at_fitting_size(self._mix, self.settings['large_kernel_size'], fused, normed)

    def _mix(self, fused: Tensor, normed: Tensor) -> Tensor:
        x, h = normed.split(self.split_sizes, dim=1)
        query, key = self.query(x), self.key(h)
        return contmix(fused, query, key, self.kernel_weight, self.kernel_bias, self.rpb1, self.rpb2, **self.settings)


class Attention(nn.Module):
    """A :class:`SqueezeExcitation` that overwrites its input. Its convolutions, on one position, are linear layers.

    They compute in the dtype of their weights, also under autocast: on one position, casting weights would take longer.
    """

    def __init__(self, attention: SqueezeExcitation) -> None:
        super().__init__()
        _, reduce, gelu, expand, sigmoid = attention.proj
        self.proj = nn.Sequential(_as_linear(reduce), gelu, _as_linear(expand), sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        dtype = getattr(self.proj[0].weight, 'dtype', torch.float32)  # quantized layers have none, and take float32
        with autocast_disabled(x.device.type):
            gates = self.proj(x.mean(dim=(2, 3), dtype=dtype))
        return x.mul_(gates[..., None, None].to(x.dtype))


def _as_linear(conv: nn.Conv2d) -> nn.Linear:
    linear = nn.Linear(conv.in_channels, conv.out_channels, device='meta')
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    linear.bias = conv.bias
    return linear


class HiddenMap(nn.Module):
    """The hidden map of an MLP: 1x1 convolution, GELU, residual 3x3 convolution, response norm."""

    def __init__(self, expand: nn.Conv2d, mix: ResidualDepthwiseConv, norm: GlobalResponseNorm) -> None:
        super().__init__()
        self.expand = FoldedConv2d(expand, activation='gelu')
        self.mix, self.norm = mix, norm

    def forward(self, x: Tensor) -> Tensor:
        mix, norm = self.mix, self.norm
        x = self.expand(x)
        return residual_depthwise_norm(
            x, mix.weight, mix.bias, norm.gamma.flatten(), norm.beta.flatten(), norm.eps, inplace=True
        )


class ScaledSum(nn.Module):
    """``scale(x) + conv(y)``, which overwrites x. The convolution already has the shift of the scale in its bias."""

    def __init__(self, scale: nn.Module, conv: FoldedConv2d) -> None:
        super().__init__()
        self.conv = conv
        factor = scale.weight.detach().view(-1, 1, 1) if isinstance(scale, LayerScale) else None
        self.register_buffer('factor', factor)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.factor is not None:
            x = x.mul_(self.factor.to(x.dtype))
        return self.conv.add_to(x, y)
