"""Blocks and layers in which operators do the work of several layers, for training."""

from __future__ import annotations

from typing import Union

import torch
import torch.nn as nn
from torch import Tensor

from ..models.blocks import BasicBlock, DynamicBlock
from ..models.layers import (
    GELU,
    Conv2d,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale,
    ResidualDepthwiseConv,
    SqueezeExcitation,
    has_hooks,
    is_as_built,
)
from ..models.norms import updating_together
from ..models.overlock import OverLoCK
from ..ops import gelu_residual_depthwise_norm
from ..ops._modes import is_compiling
from ..ops.elementwise import scale_and_shift, scaled_sum, squeeze_excitation
from ..ops.norms import layer_norm_of_branch


class FusedOverLoCK(OverLoCK):
    """An :class:`OverLoCK` whose norms update their buffers together."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with updating_together():
            return super().forward(x)


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` in which every GELU, residual depth-wise convolution and response norm run as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return run_layers(list(self), x)


class FusedSqueezeExcitation(SqueezeExcitation):
    """A :class:`SqueezeExcitation` in one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return squeeze_excitation(x, *self.matrices()) if self.is_one_operator() else super().forward(x)

    def is_one_operator(self) -> bool:
        """Whether reading the tensors of its layers does what calling them does. Compilers have operators of their own."""
        if is_compiling() or type(self.proj) is not nn.Sequential or has_hooks(self.proj) or len(self.proj) != 5:
            return False
        pool, reduce, gelu, expand, sigmoid = self.proj
        return (
            is_as_built(pool, (nn.AdaptiveAvgPool2d,))
            and all(is_as_built(each, (Conv2d,), 'weight', 'bias') for each in (reduce, expand))
            and is_as_built(gelu, (GELU,))
            and is_as_built(sigmoid, (nn.Sigmoid,))
        )

    def matrices(self) -> tuple[Tensor, ...]:
        """Weight and bias of both layers: (R, C), (R), (C, R), (C)."""
        _, reduce, _, expand, _ = self.proj
        return reduce.weight.flatten(1), reduce.bias, expand.weight.flatten(1), expand.bias


class FusedBasicBlock(BasicBlock):
    """A :class:`BasicBlock` whose shortcut is added together with its scale."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.proj) is not FusedSequential or has_hooks(self.proj) or not is_layer_norm(self.proj[0]):
            return super().forward(x)
        norm, *layers = self.proj
        branch, x = layer_norm_of_branch(self.dwconv(x), norm.weight, norm.bias, norm.eps)
        return scale_and_add(self.ls, x, run_layers(layers, branch))


class FusedDynamicBlock(DynamicBlock):
    """A :class:`DynamicBlock` whose sums are made together with their scales."""

    def forward(self, x: Tensor, h: Tensor, prior: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:
        if self.mix_context:
            h = sum_of_scaled(self.x_scale, h, self.h_scale, prior)
        normed, y = norm_of_branch(self.norm1, self.dwconv1(torch.cat([x, h], dim=1)))
        fused = self.fusion(normed)
        mixed = self.dyconv_proj(self.contmix(fused, normed)) + self.lepe(fused)
        mixed = gated_excitation(self.gate, fused, self.se_layer, mixed)
        y = scale_and_add(self.ls1, y, self.drop_path(self.proj(mixed)))
        normed, y = norm_of_branch(self.norm2, self.dwconv2(y))
        y = scale_and_add(self.ls2, y, self.drop_path(self.mlp(normed)))
        return y if self.last else y.split([self.channels, self.context_channels], dim=1)


def run_layers(layers: list[nn.Module], x: Tensor) -> Tensor:
    """One layer after the other, and every middle of an MLP as one operator."""
    while layers:
        if is_middle_of_mlp(layers[:3]):
            _, conv, norm = layers[:3]
            layers = layers[3:]
            gamma, beta = norm.gamma.flatten(), norm.beta.flatten()
            x = gelu_residual_depthwise_norm(x, conv.weight, conv.bias, gamma, beta, norm.eps)
        else:
            first, *layers = layers
            x = first(x)
    return x


def is_middle_of_mlp(layers: list[nn.Module]) -> bool:
    """Whether reading the tensors of these layers does what calling them does."""
    return (
        len(layers) == 3
        and is_as_built(layers[0], (GELU,))
        and is_as_built(layers[1], (ResidualDepthwiseConv,), 'weight', 'bias')
        and is_as_built(layers[2], (GlobalResponseNorm,), 'gamma', 'beta')
    )


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether reading the tensors of this norm does what calling it does."""
    return is_as_built(norm, (LayerNorm2d,), 'weight', 'bias')


def norm_of_branch(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x), x``, in one operator if the norm is as it was built."""
    if is_layer_norm(norm):
        return layer_norm_of_branch(x, norm.weight, norm.bias, norm.eps)
    return norm(x), x


def gated_excitation(gate: nn.Module, fused: Tensor, excitation: nn.Module, mixed: Tensor) -> Tensor:
    """``gate(fused) * excitation(mixed)``, in one operator from the gate's SiLU on, if all are as they were built."""
    is_excitation = type(excitation) is FusedSqueezeExcitation and not has_hooks(excitation)
    if not (ends_in_silu(gate) and is_excitation and excitation.is_one_operator()):
        return gate(fused) * excitation(mixed)
    *layers, silu = gate
    other = run_layers(layers, fused)
    if other.dtype != mixed.dtype:
        return silu(other) * excitation(mixed)
    return squeeze_excitation(mixed, *excitation.matrices(), other)


def ends_in_silu(layers: nn.Module) -> bool:
    """Whether the last of some layers is a SiLU that may be applied without calling it."""
    is_sequence = type(layers) is nn.Sequential and not has_hooks(layers)
    return is_sequence and len(layers) > 0 and is_as_built(layers[-1], (nn.SiLU,))


def is_scale(layer: nn.Module) -> bool:
    """Whether reading the tensors of this scale does what calling it does."""
    return is_as_built(layer, (LayerScale,), 'weight', 'bias')


def sum_of_scaled(scale: nn.Module, x: Tensor, other_scale: nn.Module, other: Tensor) -> Tensor:
    """``scale(x) + other_scale(other)``, in one operator if both scales are as they were built."""
    if is_scale(scale) and is_scale(other_scale) and other.dtype == x.dtype:
        return scaled_sum(x, scale.weight, scale.bias, other, other_scale.weight, other_scale.bias)
    return scale(x) + other_scale(other)


def scale_and_add(scale: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    """``scale(x) + branch``, in one operator if the scale is as it was built."""
    if is_scale(scale) and branch.dtype == x.dtype:
        return scale_and_shift(x, scale.weight, scale.bias, branch)
    return scale(x) + branch
