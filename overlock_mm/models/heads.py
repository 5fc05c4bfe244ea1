"""OverLoCK's classification head, for mmpretrain's ``ImageClassifier``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from ..checkpoints.loading import TakesReleasedCheckpoints
from ..versions import require
from .arguments import positive_int
from .head_layers import class_scores, main_head

require('mmpretrain', 'the classification head')

from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmpretrain.models.heads import ClsHead  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402


class OverLoCKHead(TakesReleasedCheckpoints, ClsHead):
    """Classification head with an optional auxiliary head on the overview, for training.

    The parameters have the names of a released classification checkpoint (``head.*`` and ``aux_head.*``).

    Args:
        num_classes: number of classes.
        in_channels: channels of the backbone's last output (C4 + C4/4).
        overview_channels: channels of the overview (C4), the backbone's second-to-last output. The auxiliary head needs a
            backbone with ``out_indices=(4, 3)``. None builds no auxiliary head; ``out_indices=(3,)`` is then enough.
        hidden_channels: hidden channels of the main head.
        loss: config of the main loss. The default is cross entropy.
        aux_loss: config of the auxiliary loss. The default is ``loss`` with weight 0.4, as in the release.
        topk: as in mmpretrain's ``ClsHead``.
        cal_acc: as in mmpretrain's ``ClsHead``.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads the heads of a released classification checkpoint. With
            other classes, the last layers are not loaded.

    Raises:
        ImportError: mmpretrain is not installed.
        ValueError: a number is no positive int.
    """

    layers_of_data = ('head.4', 'aux_head.2')

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        overview_channels: Optional[int] = None,
        hidden_channels: int = 1024,
        loss: Optional[dict] = None,
        aux_loss: Optional[dict] = None,
        topk: Union[int, tuple[int, ...]] = (1,),
        cal_acc: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        loss = loss or {'type': 'CrossEntropyLoss', 'loss_weight': 1.0}
        # The losses are mmpretrain's, also in a model of another framework.
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
            if overview_channels is not None:
                self.aux_loss_module = MODELS.build(aux_loss or {**loss, 'loss_weight': 0.4})
        num_classes = self.num_classes = positive_int('num_classes', num_classes)
        in_channels = positive_int('in_channels', in_channels)
        self.head = main_head(in_channels, hidden_channels, class_scores(hidden_channels, num_classes))
        self.aux_head = None
        if overview_channels is not None:
            overview_channels = positive_int('overview_channels', overview_channels)
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(overview_channels),
                nn.AdaptiveAvgPool2d(1),
                class_scores(overview_channels, num_classes),
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        auxiliary = [name for name in state_dict if name.startswith(f'{prefix}aux_head.')]
        if self.aux_head is None and auxiliary:
            print_log('Left out the auxiliary head of the checkpoint: the model has none.', logger='current')
            for name in auxiliary:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Return class scores (B, num_classes) for a sequence of backbone outputs (B, C, H, W). The last output is used."""
        return self.head(feats[-1]).flatten(1)

    def forward_aux(self, feats: Sequence[Tensor]) -> Tensor:
        """Return auxiliary class scores (B, num_classes) for backbone outputs with the overview second to last.

        Raises:
            ValueError: there is only one output.
        """
        if len(feats) < 2:
            raise ValueError(f'feats must have two maps, from a backbone with out_indices=(4, 3), got {len(feats)}')
        return self.aux_head(feats[-2]).flatten(1)

    def loss(self, feats: Sequence[Tensor], data_samples: list, **kwargs) -> dict:
        """Return ``loss`` and, with an auxiliary head, ``aux_loss`` for backbone outputs and their data samples."""
        losses = super().loss(feats, data_samples, **kwargs)
        if self.aux_head is not None:
            field = 'gt_score' if 'gt_score' in data_samples[0] else 'gt_label'  # mixup and cutmix give soft labels
            targets = [sample.get(field) for sample in data_samples]
            target = torch.stack(targets) if field == 'gt_score' else torch.cat(targets)
            losses['aux_loss'] = self.aux_loss_module(self.forward_aux(feats), target, avg_factor=len(target), **kwargs)
        return losses
