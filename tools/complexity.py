"""Parameters and multiply-adds of shipped configs, counted operation by operation without memory for weights or maps.

    python tools/complexity.py                                          # all of them, as the metafiles have them
    python tools/complexity.py mmpretrain/overlock-t_deploy_in1k --shape 384 384

Multiply-adds (the "FLOPs" of this field's tables) are those of convolutions, matrix products and ContMix, for one image at
evaluation: of a whole classifier at 224 x 224, of a whole segmentor at 512 x 2048, and of the backbone alone of a detector
(800 x 1280) or a Mask2Former, whose heads depend on more than the image. Parameters are the whole model's, without the
auxiliary heads of classifiers.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.registry.utils import init_default_scope
from torch.utils.flop_counter import FlopCounterMode

import overlock_mm
from overlock_mm.ops import _library

SHAPES = {'mmdet': (800, 1280), 'mmseg': (512, 2048), 'mmpretrain': (224, 224)}


class Complexity(NamedTuple):
    parameters: int
    multiply_adds: int
    shape: tuple[int, int]
    of_backbone: bool  # the multiply-adds


def contmix_flops(value: tuple, query: tuple, keys: tuple, bias, rpb_small, rpb_large, small: int, large: int, **_) -> int:
    """Floating-point operations, two for each multiply-add, of ContMix on shapes (docs/contmix.md).

    For each position: in each group the products of the query with a key for every slot (``keys`` is (B, G, slots, C/2/G),
    the context under the weights of the logits), and the sums over both windows, each over half of the channels.
    """
    batch, channels, height, width = value
    _, groups, slots, channels_per_group = keys
    return 2 * batch * height * width * (groups * slots * channels_per_group + channels // 2 * (small**2 + large**2))


def complexity(config: str, shape: Optional[tuple[int, int]] = None) -> Complexity:
    """Count a shipped config.

    Args:
        config: as in ``overlock_mm.list_configs()``; '.py' may be left out.
        shape: height and width of the image; by default the usual one of the framework.

    Raises:
        RuntimeError: the operator is not compiled: its reference does more than it counts.
    """
    if _library.missing:
        raise RuntimeError(f'the operator must be compiled: {_library.missing}')
    cfg = Config.fromfile(overlock_mm.get_config_path(config))
    init_default_scope(cfg.default_scope)
    shape = shape or SHAPES[cfg.default_scope]
    of_backbone = cfg.default_scope == 'mmdet' or cfg.model.get('decode_head', {}).get('type') == 'Mask2FormerHead'
    with torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
        image = torch.empty(1, 3, *shape)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.overlock_mm._contmix: contmix_flops})
    with torch.no_grad(), counter:
        model.backbone(image) if of_backbone else model(image, mode='tensor')
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith('head.aux_head.'))
    return Complexity(parameters, counter.get_total_flops() // 2, tuple(shape), of_backbone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', help='as in overlock_mm.list_configs() (default: all)')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='height and width of the image')
    args = parser.parse_args()
    for config in args.configs or overlock_mm.list_configs():
        try:
            found = complexity(config, args.shape)
        except (FileNotFoundError, RuntimeError) as error:
            sys.exit(str(error))
        height, width = found.shape
        print(
            f'{config.removesuffix(".py"):70} {found.parameters / 1e6:7.2f} M parameters '
            f'{found.multiply_adds / 1e9:8.2f} G multiply-adds at {height} x {width}'
            f'{" (backbone)" if found.of_backbone else ""}'
        )


if __name__ == '__main__':
    main()
