"""Small layers of OverLoCK, with the parameter names of the released checkpoints.

B images, C channels, maps of H x W positions.
"""

from __future__ import annotations

import functools

import torch
import torch.nn as nn
from torch import Tensor

from ..ops import conv2d, depthwise_conv2d, gelu, global_response_norm, layer_norm, residual_depthwise_conv2d
from ..ops._autocast import autocast_disabled
from ..ops.elementwise import scale_and_shift
from ..ops.pooling import adaptive_avg_pool2d


class Conv2d(nn.Conv2d):
    """A dense convolution, padded so that a stride of 1 keeps the size of the map.

    Args:
        in_channels, out_channels: C of the input and the output (B, C, H, W).
        kernel_size: odd.
        stride: of the convolution.
        bias: whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DepthwiseConv(nn.Conv2d):
    """A depth-wise convolution that keeps the size of the map.

    Args:
        channels: C of the input and the output (B, C, H, W).
        kernel_size: odd.
        dilation: distance between the taps of the kernel, in positions.
        bias: whether there is one.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, bias: bool = True) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class ResidualDepthwiseConv(DepthwiseConv):
    """``x + depth-wise 3x3 convolution of x``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return residual_depthwise_conv2d(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W), at every position by itself.

    Under autocast it computes in float32, as PyTorch's does, and gives the dtype that convolutions take.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """The means over S x S windows that cover a map (B, C, H, W): (B, C, S, S).

    Args:
        size: S.
    """

    def __init__(self, size: int) -> None:
        super().__init__((size, size))

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, self.output_size)


class GELU(nn.GELU):
    """The exact GELU."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of (B, C, H, W) (Woo et al., ConvNeXt V2, eq. 1-3). It starts as the identity."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return global_response_norm(x, self.gamma.flatten(), self.beta.flatten(), self.eps)


class LayerScale(nn.Module):
    """A learnt scale and shift per channel: ``x * weight + bias``.

    Args:
        channels: C of the input (B, C, H, W).
        init_value: initial value of the weights. The biases start at 0.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # The checkpoints have (C, 1, 1, 1): the release runs it as a depth-wise 1x1 convolution.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), float(init_value)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scale_and_shift(x, self.weight, self.bias)


class SqueezeExcitation(nn.Module):
    """Channel attention from the global mean (Hu et al., CVPR 2018), with at least 16 hidden channels."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(16, channels // reduction)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            Conv2d(channels, hidden, kernel_size=1),
            GELU(),
            Conv2d(hidden, channels, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return scale_and_shift(x, self.proj(x))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training, a sample's branch is dropped or scaled up.

    Args:
        drop_prob: probability of dropping the branch of a sample.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep_prob)  # (B, 1, 1, 1)
        return x * (kept / keep_prob)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob}'


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, or a forward put in the place of its class's."""
    attributes = module.__dict__  # by hand: this is asked for hundreds of layers in a forward
    return bool(
        attributes['_forward_hooks']
        or attributes['_forward_pre_hooks']
        or attributes['_backward_hooks']
        or attributes['_backward_pre_hooks']
        or 'forward' in attributes
    )


def is_as_built(module: nn.Module, kinds: tuple[type, ...], *parameters: str) -> bool:
    """Whether reading a layer's tensors does what calling it does.

    Args:
        module: the layer.
        kinds: its type is one of them. A derived class has a forward of its own.
        parameters: the names of all that it has. Others would show that something computes its weights.
    """
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return type(module) in kinds and own == set(parameters) and not has_hooks(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP shards a module, by a wrapper (``FullyShardedDataParallel``) or in its place (``fully_shard``)."""
    return _is_of_fsdp(type(module))


@functools.cache  # this, too, is asked for hundreds of layers in a forward
def _is_of_fsdp(kind: type) -> bool:
    # By name: versions of torch have the classes in different places.
    return any(base.__name__ in ('FullyShardedDataParallel', 'FSDPModule') for base in kind.__mro__)


def as_matrix(layer: nn.Module, num_features: int, like: Tensor, size: tuple[int, ...] = (1, 1)) -> tuple[Tensor, Tensor]:
    """The matrix (L, N) and the bias (L) of a layer that is affine in its features, such as a 1x1 convolution.

    A convolution as it was built has them as parameters. Any other layer is called, on the N basis vectors and on zero. So
    its hooks run, and a wrapper, an adapter, a pruned or a normalised weight counts. Autocast is off for it: a matrix is
    rounded where it is used, and not twice.

    Args:
        layer: takes N features, and gives L.
        num_features: N.
        like: a tensor with the layer's device and dtype.
        size: of the map that the layer takes, (1, 1), or () for a linear layer.
    """
    if is_as_built(layer, (Conv2d,), 'weight', 'bias') and layer.weight.shape[1:] == (num_features, *size):
        return layer.weight.flatten(1), layer.bias
    # Long basis vectors: adding and subtracting the bias costs little precision then. float16 has a small range.
    scale = 2.0**6 if like.dtype == torch.float16 else 2.0**16
    basis = scale * torch.eye(num_features + 1, num_features, dtype=like.dtype, device=like.device)  # last row 0
    with autocast_disabled(like.device.type):
        out = layer(basis.view(num_features + 1, num_features, *size)).flatten(1)  # (N + 1, L)
    bias = out[num_features]
    return (out[:num_features] - bias).t() / scale, bias
