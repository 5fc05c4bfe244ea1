"""Convert a checkpoint for strict loading with its config, or back into the release's form.

    python tools/convert_checkpoint.py overlock_t_in1k_224.pth overlock-t_in1k.pth
    python tools/convert_checkpoint.py work_dirs/.../epoch_300.pth mine.pth --to released

It reads checkpoints of the published variants: released ones (classifiers, folded ones, mmdet 2.x detectors, mmseg 0.x
segmentors, backbones alone) and this project's own. It prints what it found. Weights are copied bit by bit, except with
--fold. Optimizer states and logs are left out.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overlock_mm.checkpoints.files import read_checkpoint, released_state_dict
from overlock_mm.models.conversion import (
    CheckpointDescription,
    classes_of,
    describe_checkpoint,
    fold,
    to_openmmlab_names,
    to_released_names,
)


class ShippedModel(NamedTuple):
    """A kind of model with shipped configs, recognised by one of its weights.

    Attributes:
        weight: name of the weight, whose first dimension gives the number of classes.
        config: name of the shipped config, with {} for the variant.
        classes: number of classes in the config.
        rows: rows of the weight for a number of classes: (factor, summand).
        options: settings of the config that contain the number of classes.
        arches: variants with such a config.
    """

    weight: str
    config: str
    classes: int
    rows: tuple[int, int]
    options: tuple[str, ...]
    arches: tuple[str, ...] = ('xt', 't', 's', 'b')


SHIPPED_MODELS = (
    ShippedModel('head.head.4.bias', 'mmpretrain/overlock-{}_8xb256_in1k.py', 1000, (1, 0), ('model.head.num_classes',)),
    ShippedModel(
        'roi_head.bbox_head.fc_cls.weight', 'mmdet/mask-rcnn_overlock-{}_fpn_1x_coco.py', 80, (1, 1),
        ('model.roi_head.bbox_head.num_classes', 'model.roi_head.mask_head.num_classes'),
    ),
    ShippedModel(
        'roi_head.bbox_head.0.fc_cls.weight', 'mmdet/cascade-mask-rcnn_overlock-{}_fpn_ms-crop-3x_coco.py', 80, (1, 1),
        (*(f'model.roi_head.bbox_head.{i}.num_classes' for i in range(3)), 'model.roi_head.mask_head.num_classes'),
    ),
    ShippedModel(
        'bbox_head.retina_cls.weight', 'mmdet/retinanet_overlock-{}_fpn_1x_coco.py', 80, (9, 0),
        ('model.bbox_head.num_classes',), ('t',),
    ),
    ShippedModel(
        'bbox_head.cls_branches.0.weight', 'mmdet/dino-4scale_overlock-{}_8xb2-12e_coco.py', 80, (1, 0),
        ('model.bbox_head.num_classes',), ('t',),
    ),
    ShippedModel(
        'auxiliary_head.conv_seg.weight', 'mmseg/overlock-{}_upernet_8xb2-160k_ade20k-512x512.py', 150, (1, 0),
        ('model.decode_head.num_classes', 'model.auxiliary_head.num_classes'),
    ),
    ShippedModel(
        'decode_head.cls_embed.weight', 'mmseg/overlock-{}_mask2former_8xb2-160k_ade20k-512x512.py', 150, (1, 1),
        ('model.decode_head.num_classes',), ('t',),
    ),
)  # fmt: skip


def written_by(meta: Mapping) -> str:
    for key, framework in (('mmdet_version', 'mmdet'), ('mmseg_version', 'mmseg'), ('mmengine_version', 'mmengine')):
        if key in meta:
            return f', written by {framework} {meta[key]}'
    return ''


def summary(file: Path, description: CheckpointDescription, state_dict: Mapping[str, torch.Tensor]) -> str:
    names = 'flat names' if description.released_names else "OpenMMLab's names"
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    parameters = sum(tensor.numel() for name, tensor in state_dict.items() if not name.endswith(statistics))
    return (
        f'{file}: OverLoCK-{description.arch.upper()}, {description.family} ({description.out_type}), '
        f'{"folded" if description.deploy else "not folded"}, {names}: {len(state_dict)} tensors, '
        f'{parameters / 1e6:.1f} M parameters'
    )


def how_to_load(description: CheckpointDescription, state_dict: Mapping[str, torch.Tensor]) -> str:
    """A message: the shipped config whose model loads these weights, and the options that it needs."""
    found = [model for model in SHIPPED_MODELS if model.weight in state_dict and description.arch in model.arches]
    if not found:
        return "No shipped config fits this model: load it with its own config, or as a backbone's init_cfg."
    model = found[0]
    config = model.config.format(description.arch)
    factor, summand = model.rows
    classes = (state_dict[model.weight].shape[0] - summand) // factor
    options = [f'{option}={classes}' for option in model.options if classes != model.classes]
    if description.family == 'classification':
        if description.deploy:
            config = config.replace('8xb256', 'deploy')
        if not any(name.startswith('head.aux_head.') for name in state_dict):
            options.append('model.head.overview_channels=None')
    elif description.deploy:
        options.append('model.backbone.deploy=True')
    with_options = f' with --cfg-options {" ".join(options)}' if options else ''
    return f'It loads strictly into the model of configs/{config}{with_options}'


def metadata(meta: Mapping, released: bool) -> dict[str, Any]:
    """Names and colours of the classes, under the keys of the current OpenMMLab or of the release."""
    classes = classes_of(meta)
    palette = (meta.get('dataset_meta') or {}).get('palette') or meta.get('PALETTE')
    found = {key: value for key, value in (('classes', classes), ('palette', palette)) if value is not None}
    if released:
        return {key.upper(): value for key, value in found.items()}
    return {'dataset_meta': found} if found else {}


def save(content: Any, file: Path) -> None:
    """Write a temporary file and rename it, so that the file is never incomplete."""
    part = file.with_name(f'{file.name}.{os.getpid()}.part')
    try:
        torch.save(content, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', type=str, metavar='SRC', help='checkpoint: a path, an address, or overlock_mm://NAME')
    parser.add_argument('dst', type=Path, metavar='DST', help='file to write')
    parser.add_argument(
        '--to',
        choices=['openmmlab', 'released'],
        default='openmmlab',
        help='form of names and metadata',
    )
    parser.add_argument('--fold', action='store_true', help='fold the dilated branches, for models with deploy=True')
    parser.add_argument('--overwrite', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    if args.dst.is_file() and not args.overwrite:
        sys.exit(f'{args.dst} already exists: remove it, or use --overwrite')
    if args.dst.is_dir():
        sys.exit(f'DST must be a file, got the folder {args.dst}')
    if not args.dst.parent.is_dir():
        sys.exit(f'{args.dst.parent} is not a folder')

    try:
        content = read_checkpoint(args.src)
        state_dict = released_state_dict(content, args.src)
        description = describe_checkpoint(state_dict)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f'{args.src} was not converted: {error}')
    meta = content.get('meta') if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    print(summary(args.src, description, state_dict) + written_by(meta))

    if args.fold:
        state_dict = fold(state_dict)
    is_whole_model = description.family in ('detection', 'segmentation')
    if args.to == 'released':
        state_dict = to_released_names(state_dict, description)
        # Released classifiers are plain state dicts. Detectors and segmentors have the form of mmdet 2.x and mmseg 0.x.
        content = dict(meta=metadata(meta, released=True), state_dict=state_dict) if is_whole_model else state_dict
    else:
        state_dict = to_openmmlab_names(state_dict, description)
        content = dict(meta=metadata(meta, released=False), state_dict=state_dict)
    save(content, args.dst)
    written = describe_checkpoint(state_dict)
    print(summary(args.dst, written, state_dict))
    if args.to == 'openmmlab':
        print(how_to_load(written, state_dict))


if __name__ == '__main__':
    main()
