"""Count parameters and multiply-adds of shipped configs, operation by operation, on the meta device.

    python tools/complexity.py                                          # all configs, as in the metafiles
    python tools/complexity.py mmpretrain/overlock-t_deploy_in1k --shape 384 384

Multiply-adds (the "FLOPs" in this field's tables) are those of convolutions, matrix products and ContMix, for one image at
evaluation. They are counted for a whole classifier at 224 x 224 and for a whole segmentor at 512 x 2048. For a detector
(800 x 1280) and a Mask2Former they are counted for the backbone, because the work of their heads depends on more than the
image. Parameters are those of the whole model, without the auxiliary heads of classifiers.
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


def complexity(config: str, shape: Optional[tuple[int, int]] = None) -> Complexity:
    """Count a shipped config.

    Args:
        config: a name from ``overlock_mm.list_configs()``; '.py' may be left out.
        shape: height and width of the image; by default the one above.

    Raises:
        RuntimeError: there is no compiled operator. The reference does other operations.
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
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.backbone(image) if of_backbone else model(image, mode='tensor')
    # The matrix W_d is read by calling its layer on basis vectors: work that does not depend on the image.
    reading = sum(
        sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
        if name.endswith(('.weight_proj', '.kernel_proj'))
    )
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith('head.aux_head.'))
    return Complexity(parameters, (counter.get_total_flops() - reading) // 2, tuple(shape), of_backbone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', help='names from overlock_mm.list_configs(); default: all')
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
