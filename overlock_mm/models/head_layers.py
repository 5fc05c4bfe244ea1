"""The layers of the classification head, for mmpretrain's head and timm's classifier."""

from __future__ import annotations

import torch.nn as nn
from mmengine.model.weight_init import trunc_normal_


def initialized(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution, with weights as the release starts them."""
    trunc_normal_(conv.weight, std=0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def class_scores(in_channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head: (B, in_channels, 1, 1) to (B, num_classes, 1, 1)."""
    return initialized(nn.Conv2d(in_channels, num_classes, kernel_size=1))


def main_head(in_channels: int, hidden_channels: int, classifier: nn.Module) -> nn.Sequential:
    """The main head of the release, for the backbone's last map (B, in_channels, H, W).

    The layers have the names of the released files. ``classifier`` is the last one, and takes the hidden features,
    (B, hidden_channels, 1, 1).
    """
    return nn.Sequential(
        initialized(nn.Conv2d(in_channels, hidden_channels, kernel_size=1, bias=False)),
        nn.BatchNorm2d(hidden_channels),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        classifier,
    )
