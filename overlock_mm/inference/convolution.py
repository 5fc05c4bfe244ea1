"""Convolutions for inference: with the norms and scales beside them folded in, and their weights packed for oneDNN."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.layers import GELU, DepthwiseConv, LayerScale, ResidualDepthwiseConv
from ..models.reparam import DilatedReparamConv
from ..ops import depthwise_conv2d, gelu
from ..ops._autocast import cast_as_autocast, dtype_under_autocast, is_autocast_enabled
from ..ops._reference import exact_dtype
from .onednn import HAS_FAST_BFLOAT16, PackedConv2d, can_pack

#: Positions of a bfloat16 map from which on oneDNN's depth-wise 3x3 convolution is faster than this package's, where the
#: processor computes in bfloat16.
_LARGE_MAP = 4200
_NAMES = {GELU: 'gelu', nn.SiLU: 'silu'}
_ACTIVATIONS = {'gelu': gelu, 'silu': F.silu}


class FoldedConv2d(nn.Module):
    """A convolution as it is at inference: one weight and one bias, followed by an activation.

    Weight and bias are buffers, copied from the layers. On the CPU they are also packed in oneDNN's layout, once for each
    dtype that is used.

    Args:
        conv: the convolution, or the convolution with parallel branches.
        norm: a batch norm after the convolution. Its running statistics are folded in.
        norm_before: a batch norm before a 1x1 convolution.
        scale: a LayerScale whose shift is added to the output.
        activation: 'gelu' (the exact one), 'silu' or None.
    """

    def __init__(
        self,
        conv: nn.Module,
        norm: Optional[nn.Module] = None,
        norm_before: Optional[nn.Module] = None,
        scale: Optional[nn.Module] = None,
        activation: Optional[str] = None,
    ) -> None:
        super().__init__()
        branches, conv = conv, conv.lk_origin if isinstance(conv, DilatedReparamConv) else conv
        weight, bias = _weight_and_bias(branches)
        if norm is not None:
            factor, shift = _factor_and_shift(norm, weight.dtype)
            weight, bias = weight * factor.view(-1, 1, 1, 1), bias * factor + shift
        if norm_before is not None:
            factor, shift = _factor_and_shift(norm_before, weight.dtype)
            weight, bias = weight * factor.view(1, -1, 1, 1), bias + weight.flatten(1) @ shift
        if isinstance(scale, LayerScale):
            bias = bias + scale.bias.to(bias.dtype)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.is_depthwise = isinstance(conv, DepthwiseConv)
        self.activation = activation
        # The layout that a dense convolution would bring a 3x3 kernel into at every call.
        layout = torch.contiguous_format if self.is_depthwise else torch.channels_last
        self.register_buffer('weight', weight.to(conv.weight.dtype).contiguous(memory_format=layout))
        self.register_buffer('bias', bias.to(conv.weight.dtype))
        self._packed: dict[torch.dtype, PackedConv2d] = {}

    def forward(self, x: Tensor) -> Tensor:
        """``activation(conv(x))``.

        Raises:
            RuntimeError: a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError('an optimized model has no gradients: use the model that was given to optimize()')
        packed = self._pack_for(x)
        if packed:
            return packed(cast_as_autocast(x), self.activation)
        if self.is_depthwise:
            y = depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])
        else:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if self.activation is None else _ACTIVATIONS[self.activation](y)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """``out + conv(x)``. ``out`` is overwritten."""
        packed = self._pack_for(x)
        if packed and out.dtype == dtype_under_autocast(x):
            return packed.add_to(out, cast_as_autocast(x))
        return out + self(x)

    def _pack_for(self, x: Tensor) -> Optional[PackedConv2d]:
        """The packed weights for a map, where oneDNN is the fastest way."""
        if not can_pack(x):
            return None
        dtype = dtype_under_autocast(x)
        if self.is_depthwise and not self._is_faster_by_onednn(x, dtype):
            return None
        if self.weight.dtype != x.dtype and not is_autocast_enabled(x.device.type):
            return None  # PyTorch's convolution raises the error
        packed = self._packed.get(dtype)
        if packed is None:
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            packed = self._packed[dtype] = PackedConv2d(weight, bias, self.stride, self.padding, self.groups, x.shape)
        return packed

    def _is_faster_by_onednn(self, x: Tensor, dtype: torch.dtype) -> bool:
        if self.weight.shape[-1] != 3:
            return False
        large_half = dtype == torch.bfloat16 and x.shape[2] * x.shape[3] >= _LARGE_MAP and HAS_FAST_BFLOAT16
        return self.activation is not None or large_half

    def _apply(self, *args: Any, **kwargs: Any) -> FoldedConv2d:
        self._packed.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_packed': {}}  # neither copies nor files can hold oneDNN's tensors

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[:2]
        return f'{inputs * self.groups}, {outputs}, kernel_size={self.weight.shape[-1]}, activation={self.activation}'


def fold_sequence(layers: nn.Sequential) -> nn.Sequential:
    """A sequence of convolutions, batch norms and activations, with norms and activations folded into the convolutions."""
    folded: list[nn.Module] = []
    rest = list(layers)
    while rest:
        layer = rest.pop(0)
        if isinstance(layer, nn.Conv2d):
            norm = rest.pop(0) if rest and isinstance(rest[0], _BatchNorm) else None
            activation = _NAMES[type(rest.pop(0))] if rest and type(rest[0]) in _NAMES else None
            layer = FoldedConv2d(layer, norm, activation=activation)
        folded.append(layer)
    return nn.Sequential(*folded)


def _weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """In float64, where there is one: folded weights are rounded once, at the end."""
    if isinstance(conv, DilatedReparamConv) and not conv.deploy:
        return conv.folded()
    conv = conv.lk_origin if isinstance(conv, DilatedReparamConv) else conv
    exact = exact_dtype(conv.weight)
    weight = conv.weight.detach().to(exact, copy=True)
    if isinstance(conv, ResidualDepthwiseConv):
        middle = conv.kernel_size[0] // 2
        weight[:, :, middle, middle] += 1
    return weight, torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach().to(exact)


def _factor_and_shift(norm: _BatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics multiplies by and adds, (C) each."""
    factor = norm.weight.to(dtype) / torch.sqrt(norm.running_var.to(dtype) + norm.eps)
    return factor, norm.bias.to(dtype) - norm.running_mean.to(dtype) * factor
