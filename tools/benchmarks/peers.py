"""Other backbones, for comparison: torchvision's, because a machine with torch has them, with four outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

#: Names: the functions of torchvision.models that build them, and the channels of the first stage.
PEERS = {
    'convnext-tiny': ('convnext_tiny', 96),
    'convnext-small': ('convnext_small', 96),
    'convnext-base': ('convnext_base', 128),
    'swin-tiny': ('swin_t', 96),
}


class Stages(nn.Module):
    """The outputs of the four stages, each through a layer norm, as detectors use them: (B, C, H, W).

    Args:
        features: the stem, and then stages and downsampling in turns.
        channels: of the stages.
        last: whether the layers have the channels last.
    """

    def __init__(self, features: nn.Sequential, channels: Sequence[int], last: bool) -> None:
        super().__init__()
        self.features, self.last = features, last
        self.norms = nn.ModuleList(nn.LayerNorm(each, eps=1e-6) for each in channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index % 2:
                out = self.norms[index // 2](x if self.last else x.permute(0, 2, 3, 1))
                outputs.append(out.permute(0, 3, 1, 2))
        return tuple(outputs)


def build_peer(name: str) -> nn.Module:
    """A backbone with random weights, without drop path.

    Raises:
        ValueError: there is none of this name.
        ImportError: torchvision is not installed.
    """
    if name not in PEERS:
        raise ValueError(f'name must be one of {tuple(PEERS)}, got {name!r}')
    import torchvision

    function, width = PEERS[name]
    model = getattr(torchvision.models, function)(weights=None)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return Stages(model.features, [width << stage for stage in range(4)], last=name.startswith('swin'))
