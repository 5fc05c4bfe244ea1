"""ContMix as a module of its own, for any network."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor

from ..ops import contmix
from ..registry import MODELS
from .arguments import positive_int
from .blocks import mix_at_fitting_size
from .layers import AdaptiveAvgPool2d, Conv2d, LayerNorm2d, LayerScale, as_matrix

#: Channels of a group in each branch, about; the released networks have 8 to 16.
_CHANNELS_PER_GROUP = 16


@MODELS.register_module()
class ContMixBlock(BaseModule):
    """Residual block that mixes a map with context-mixing dynamic kernels: plug-and-play ContMix (paper section 3.3).

    With n the normalised input: ``x + scale * proj(ContMix(value(n)) * SiLU(gate(n)))``. OverLoCK takes the keys of ContMix
    from an overview of the image. Here the input, pooled to S x S tokens, is its own context. Each token is the mean of its
    part of the map, so the kernels of every position depend on the whole map.

    The scale starts at 0, so the block starts as the identity. A trained network keeps its outputs when the block is added.
    In the first step only the scale has a gradient other than 0, from then on all parameters have. (The scale is not the
    weight of a norm, because networks that initialise all their norms would set it to 1.)

    It is also a plugin layer of mmcv, for the ResNets of mmdet and mmseg::

        plugins=[dict(
            cfg=dict(type='overlock_mm.ContMixBlock', kernel_size=7),
            stages=(False, True, True, True), position='after_conv2')]

    Args:
        in_channels: C of the input and the output, any number. Half of the channels go to the small kernel and half to the
            large one. With an odd number, one more channel is mixed.
        num_groups: G, the groups of either kernel. Every group of channels has its own kernels. 2 * G must divide C. By
            default about C / 32, so that a group has at least 16 channels in each branch.
        kernel_size: K of the large kernel, odd. The default, 7, suits every stage of a pyramid: the cost grows with K², and
            the stride-32 map of a 224 x 224 image, 7 x 7, still holds it. (OverLoCK has 13 at stride 16, 7 at stride 32.)
            A map that is too small for the kernel is enlarged, and the result is averaged back.
        small_kernel_size: of the small kernel, odd, at most ``kernel_size``.
        context_size: S; the context has S x S tokens.
        norm_cfg: mmcv's config of the norm of the input. By default a LayerNorm over the channels, which works with any
            batch and with ``norm_eval``. New batch norms among frozen ones would never see statistics to normalise by.
        layer_scale_init_value: initial value of the scale of the residual branch.
        init_cfg: mmengine's initialisation, applied after the block's own: weights from a truncated normal distribution of
            variance 1 / fan-in, which keeps the logits of the kernels at a scale where their softmax learns.

    Raises:
        ValueError: an argument does not fit; the message names it and what it got.
    """

    _abbr_ = 'contmix_block'  # what mmcv names the plugin by in the layer that holds it

    def __init__(
        self,
        in_channels: int,
        num_groups: Optional[int] = None,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        context_size: int = 7,
        norm_cfg: Optional[dict[str, Any]] = None,
        layer_scale_init_value: float = 0.0,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        super().__init__(init_cfg)
        in_channels = positive_int('in_channels', in_channels)
        kernel_size = positive_int('kernel_size', kernel_size)
        small_kernel_size = positive_int('small_kernel_size', small_kernel_size)
        context_size = positive_int('context_size', context_size)
        for name, size in (('kernel_size', kernel_size), ('small_kernel_size', small_kernel_size)):
            if size % 2 == 0:
                raise ValueError(f'{name} must be odd, got {size}')
        if small_kernel_size > kernel_size:
            raise ValueError(f'small_kernel_size must be at most kernel_size = {kernel_size}, got {small_kernel_size}')
        channels = in_channels + in_channels % 2
        if num_groups is None:
            num_groups = _default_num_groups(channels)
        num_groups = positive_int('num_groups', num_groups)
        if channels % (2 * num_groups):
            raise ValueError(f'num_groups: 2 * num_groups must divide the {channels} channels, got {num_groups}')

        inner = channels // 2
        self.in_channels = in_channels
        self.num_groups = num_groups
        self.kernel_size = kernel_size
        self.small_kernel_size = small_kernel_size
        self.query_scale = (inner // num_groups) ** -0.5

        self.context_size = context_size
        self.norm = LayerNorm2d(in_channels) if norm_cfg is None else _build_norm(norm_cfg, in_channels)
        self.value = Conv2d(in_channels, channels, kernel_size=1)
        self.query = Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.key = nn.Sequential(AdaptiveAvgPool2d(context_size), Conv2d(in_channels, inner, kernel_size=1, bias=False))
        self.kernel_proj = nn.Linear(context_size**2, small_kernel_size**2 + kernel_size**2)  # the paper's W_d
        self.rpb_small = nn.Parameter(torch.zeros(num_groups, 2 * small_kernel_size - 1, 2 * small_kernel_size - 1))
        self.rpb_large = nn.Parameter(torch.zeros(num_groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.gate = Conv2d(in_channels, channels, kernel_size=1)
        self.proj = Conv2d(channels, in_channels, kernel_size=1)
        self.layer_scale = LayerScale(in_channels, layer_scale_init_value)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def init_weights(self) -> None:
        """Initialise as when built, then apply ``init_cfg``; not a second time.

        A ResNet that starts from nothing has Kaiming's initialisation for every convolution below it, this block's too.
        """
        if not self.is_init:
            self._reset_parameters()
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W), of any size from 1 x 1, to one of the same shape.

        Raises:
            ValueError: the input has another rank or number of channels, or an empty map.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(f'the input must have shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}')
        normed = self.norm(x)
        mixed = self.contmix(self.value(normed), self.query(normed), self.key(normed))
        return x + self.layer_scale(self.proj(mixed * F.silu(self.gate(normed))))

    def contmix(self, value: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Context mixing of ``value`` (B, C', H, W), by kernels made from ``query`` and ``key`` (section 3.3)."""
        kernel_weight, kernel_bias = as_matrix(self.kernel_proj, self.context_size**2, like=self.rpb_small, size=())

        def mix(value: Tensor, query: Tensor) -> Tensor:
            return contmix(
                value,
                query,
                key,
                kernel_weight,
                kernel_bias,
                self.rpb_small,
                self.rpb_large,
                num_groups=self.num_groups,
                small_kernel_size=self.small_kernel_size,
                large_kernel_size=self.kernel_size,
                scale=self.query_scale,
            )

        return mix_at_fitting_size(mix, self.kernel_size, value, query)


def _build_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    from mmcv.cnn import build_norm_layer  # needed only with a norm_cfg

    return build_norm_layer(norm_cfg, channels)[1]


def _default_num_groups(channels: int) -> int:
    """The most groups that divide each half of the channels into at least 16 (or into one group)."""
    half = channels // 2
    return next(groups for groups in range(max(1, half // _CHANNELS_PER_GROUP), 0, -1) if half % groups == 0)
