"""OverLoCK for timm: ``import overlock_mm.timm`` registers ``overlock_xt``, ``overlock_t``, ``overlock_s``, ``overlock_b``.

::

    import timm, overlock_mm.timm
    classifier = timm.create_model('overlock_t', pretrained=True)              # the released file, downloaded once
    classifier = timm.create_model('overlock_t', pretrained=True, pretrained_cfg_overlay=dict(file='overlock_t.pth'))
    backbone = timm.create_model('overlock_t', features_only=True)             # four maps, strides 4, 8, 16 and 32

So they are also backbones of mmpretrain and mmseg by ``TIMMBackbone``, and of mmdet by ``mmpretrain.TIMMBackbone``. The
pyramids of :class:`overlock_mm.models.OverLoCK` are better for dense tasks: they have the norms of the released files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .checkpoints.loading import released_state_dict
from .checkpoints.release import RELEASED
from .models import OverLoCK
from .models.arguments import positive_int
from .models.head_layers import class_scores, main_head
from .models.overlock import STAGES
from .versions import require

require('timm', 'overlock_mm.timm')

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models._features import feature_take_indices  # noqa: E402


class OverLoCKClassifier(OverLoCK):
    """OverLoCK with the interface of timm's models: images (B, in_chans, H, W) to class scores (B, num_classes).

    Names of weights are flat, as in the released files. The auxiliary head of a file, which serves training, is left out.

    Args:
        arch: as in :class:`overlock_mm.models.OverLoCK`.
        num_classes: number of classes. 0 gives the hidden features, 1024 of them, without the last layer.
        in_chans: channels of the image.
        global_pool: 'avg', or '' for a map that is not pooled.
        drop_rate: dropout before the last layer.
        drop_path_rate: stochastic depth.
        kwargs: other arguments of :class:`overlock_mm.models.OverLoCK`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and what it got.
    """

    layers_of_data = ('patch_embed1.0', 'head.4')
    head_hidden_size = 1024

    def __init__(
        self,
        arch: Union[str, dict[str, Any]],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, in_channels=in_chans, out_indices=(0, 1, 2, 3), drop_path_rate=drop_path_rate, **kwargs)
        self.num_features = self.out_channels[-1]
        self.drop_rate = drop_rate
        names = ('blocks1', 'blocks2', 'sub_blocks3', 'sub_blocks4')
        self.feature_info = [
            dict(num_chs=channels, reduction=4 * 2**i, module=name)
            for i, (name, channels) in enumerate(zip(names, self.out_channels))
        ]
        self.head = main_head(self.num_features, self.head_hidden_size, classifier=nn.Identity())
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.head[4]

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Start the last layer afresh, for another number of classes; 0 takes it away. ``global_pool``: None keeps it."""
        if global_pool not in (None, 'avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        if global_pool is not None:
            self.global_pool = global_pool
            self.head[3] = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
        self.num_classes = num_classes
        self.head[4] = nn.Identity()
        if num_classes != 0:
            self.head[4] = class_scores(self.head_hidden_size, positive_int('num_classes', num_classes))
            self.head[4].to(self.head[0].weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (B, num_features, H / 32, W / 32)."""
        return super().forward(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head[:4](x)  # (B, 1024, 1, 1)
        if not pre_logits:
            x = self.head[4](F.dropout(x, self.drop_rate, self.training))
        return x.flatten(1) if self.global_pool else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Union[int, Sequence[int], None] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Maps of stages 0..3, and the last map before them unless ``intermediates_only``.

        Args:
            x: images (B, in_chans, H, W).
            indices: of the maps, or the number of last ones; None for all four.
            norm: has no effect: maps have no norm.
            stop_early: has no effect: :meth:`prune_intermediate_layers` leaves out what does not have to run.
            output_fmt: 'NCHW'.
            intermediates_only: leave out the last map.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        maps = dict(zip(self.out_indices, super().forward(x)))
        intermediates = [maps[i] for i in feature_take_indices(4, indices)[0]]
        return intermediates if intermediates_only else (maps[max(maps)], intermediates)

    def prune_intermediate_layers(
        self, indices: Union[int, Sequence[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Let only those stages run that the maps of these indices need. Returns the indices, from 0."""
        taken, _ = feature_take_indices(4, indices)
        self.out_indices = tuple(taken)
        self._freeze_stages()  # stages that do not run have no gradient
        if prune_head:
            self.head = nn.Identity()
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointed_stages = frozenset(STAGES if enable else ())

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers of the parameters, for timm's layer decay (:meth:`overlock_mm.models.OverLoCK.get_layer_depth`)."""
        return lambda name: self.get_layer_depth(name)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        unused = ('aux_head.',) if self.num_classes else ('aux_head.', 'head.4.')
        for name in [name for name in state_dict if name.startswith(tuple(prefix + each for each in unused))]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _cfg(arch: str, crop_pct: float) -> dict[str, Any]:
    return dict(
        url=RELEASED[f'overlock_{arch}_in1k_224.pth'].url,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=crop_pct,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='patch_embed1.0',
        classifier='head.4',
    )


default_cfgs = generate_default_cfgs(
    {
        'overlock_xt.in1k': _cfg('xt', 0.925),
        'overlock_t.in1k': _cfg('t', 0.95),
        'overlock_s.in1k': _cfg('s', 0.95),
        'overlock_b.in1k': _cfg('b', 0.975),
    }
)


def _unwrapped(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Tensor]:
    return released_state_dict(state_dict, 'the checkpoint')


def _create(arch: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        OverLoCKClassifier,
        f'overlock_{arch}',
        pretrained,
        pretrained_filter_fn=_unwrapped,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        arch=arch,
        **kwargs,
    )


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('xt', pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('t', pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('s', pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('b', pretrained, **kwargs)
