"""Small layers of OverLoCK, with the parameter names of the released checkpoints."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import (
    depthwise_conv2d,
    global_response_norm,
    has_depthwise,
    residual_depthwise_conv2d,
    residual_depthwise_norm,
)
from ..ops._autocast import cast_as_autocast
from .recompute import has_hooks, recomputing


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


class DepthwiseConv(nn.Conv2d):
    """A depth-wise convolution that keeps the size of the map.

    Args:
        channels: C of the input and the output (B, C, H, W).
        kernel_size: odd.
        dilation: distance of the kernel's taps.
        bias: whether there is one.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, bias: bool = True) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class ResidualDepthwiseConv(DepthwiseConv):
    """``x + depth-wise 3x3 convolution of x``, or the same of GELU(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, kernel_size=3)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return residual_depthwise_conv2d(x, self.weight, self.bias, gelu)


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

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        _, reduce, gelu, expand, sigmoid = self.proj
        if not (is_plain(reduce, nn.Conv2d) and is_plain(expand, nn.Conv2d)):
            return x * self.proj(x)
        # Matrix products: on a map of one position a convolution costs many times its arithmetic.
        attention = F.linear(x.mean(dim=(2, 3)), reduce.weight.flatten(1), reduce.bias)  # (B, hidden)
        attention = F.linear(gelu(attention), expand.weight.flatten(1), expand.bias)  # (B, C)
        attention = sigmoid(attention)[..., None, None]
        return x.mul_(attention) if inplace else x * attention


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of (B, C, H, W) (Woo et al., ConvNeXt V2, eq. 1-3); the identity at the start."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return global_response_norm(x, self.gamma.flatten(), self.beta.flatten(), self.eps)


def is_plain(module: nn.Module, expected: type) -> bool:
    """Whether a module is what was built, so that its weights may be used without calling it: not wrapped, no hooks."""
    return type(module) is expected and not has_hooks(module)


def layer_norm(again: recomputing, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` for a convolution: under autocast, which makes norms in float32, in the dtype that it takes."""
    if has_hooks(norm):
        return norm(x)
    return again(lambda x: cast_as_autocast(norm(x)), x)


def gelu_mix_norm(again: recomputing, gelu: nn.Module, mix: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """The middle of an MLP: GELU, residual depth-wise convolution, response norm."""
    if not (is_plain_gelu(gelu) and can_join(mix, norm, x)):
        return again(norm, again(mix, again(gelu, x)))
    if torch.is_grad_enabled():
        return again(norm, again(partial(mix, gelu=True), x))
    return mix_norm(mix, norm, x, gelu=True)


def can_join(mix: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Whether there is an operator that does both of ``norm(mix(x))``."""
    return is_plain(mix, ResidualDepthwiseConv) and is_plain(norm, GlobalResponseNorm) and has_depthwise(x)


def mix_norm(mix: nn.Module, norm: nn.Module, x: Tensor, gelu: bool = False, inplace: bool = False) -> Tensor:
    """``norm(mix(x))``, or of GELU(x), without gradients."""
    gamma, beta = norm.gamma.flatten(), norm.beta.flatten()
    return residual_depthwise_norm(x, mix.weight, mix.bias, gamma, beta, norm.eps, gelu, inplace)


def is_plain_gelu(module: nn.Module) -> bool:
    """Whether it is the exact GELU."""
    return is_plain(module, nn.GELU) and module.approximate == 'none'


def batch_norm(again: recomputing, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, which the backward makes again without updating the running statistics a second time."""
    if not is_plain(norm, nn.BatchNorm2d):
        return norm(x)  # a synchronised one talks to other processes
    of_batch = norm.training or norm.running_mean is None
    statistics = (None, None) if of_batch else (norm.running_mean, norm.running_var)
    second = partial(_normalise, norm=norm, statistics=statistics, of_batch=of_batch)
    return again(norm, x, again=second)


def _normalise(x: Tensor, norm: nn.BatchNorm2d, statistics: tuple, of_batch: bool) -> Tensor:
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, of_batch, 0.0, norm.eps)
