"""Conversion between the names of the release and those of OpenMMLab.

Released classifiers have flat names (``patch_embed1...``, ``head...``, ``aux_head...``). Released detectors and segmentors
have OpenMMLab's names (``backbone...``, ``neck...``, ``decode_head...``). mmpretrain's ``ImageClassifier`` has its backbone
under ``backbone.`` and :class:`OverLoCKHead` under ``head.``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..checkpoints.loading import (
    CLASSIFICATION_HEADS,
    PYRAMID_MODULES,
    describe_variant,
    openmmlab_name,
    shortened,
    top_level,
)
from .overlock import ARCHITECTURES, OverLoCK
from .reparam import fold_branches


@dataclass(frozen=True)
class CheckpointDescription:
    """Description of a checkpoint, read from the names and shapes of its weights.

    Attributes:
        family: 'classification', 'detection', 'segmentation', or 'backbone' without a head.
        arch: 'xt', 't', 's' or 'b'.
        out_type: the backbone's flavour, as in :class:`OverLoCK`.
        deploy: whether the dilated branches are folded.
        released_names: whether the names are flat, as in a released classifier. Detectors and segmentors have the same
            names in both forms.
    """

    family: str
    arch: str
    out_type: str
    deploy: bool
    released_names: bool


def describe_checkpoint(state_dict: Mapping[str, Tensor]) -> CheckpointDescription:
    """Recognise a checkpoint of a published variant, from the release or from this project.

    Args:
        state_dict: the weights by name.

    Raises:
        ValueError: the weights are not recognised. The message has the reason and the first names that do not fit.
    """
    tops = {top_level(name) for name in state_dict}
    released_names = 'patch_embed1' in tops
    if not released_names and 'backbone.patch_embed1.0.weight' not in state_dict:
        shown = ', '.join(sorted(tops)[:8]) or 'nothing'
        raise ValueError(f'not an OverLoCK: it must have patch_embed1 or backbone.patch_embed1, got {shown}')
    prefix = '' if released_names else 'backbone.'
    arch = _recognise_arch(state_dict, prefix)
    family = _recognise_family(state_dict, released_names)

    own = {name[len(prefix) :] for name in state_dict if name.startswith(prefix)}
    out_type = 'features'
    if any(name.startswith('extra_norm.') for name in own):
        out_type = 'pyramid_with_overview' if 'extra_norm.4.weight' in own else 'pyramid'
    deploy = 'blocks1.0.proj.1.lk_origin.bias' in own
    _check_backbone(state_dict, prefix, arch, out_type, deploy)
    return CheckpointDescription(family, arch, out_type, deploy, released_names)


def to_openmmlab_names(state_dict: Mapping[str, Tensor], description: CheckpointDescription) -> dict[str, Tensor]:
    """Return the weights with OpenMMLab's names: flat names get the prefix ``backbone.`` or ``head.``."""
    if not description.released_names:
        return dict(state_dict)
    return {openmmlab_name(name): tensor for name, tensor in state_dict.items()}


def to_released_names(state_dict: Mapping[str, Tensor], description: CheckpointDescription) -> dict[str, Tensor]:
    """Return the weights with the names of the release. This reverses :func:`to_openmmlab_names`."""
    if description.released_names or description.family in ('detection', 'segmentation'):
        return dict(state_dict)
    return {re.sub(r'^(backbone|head)\.', '', name): tensor for name, tensor in state_dict.items()}


def fold(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with folded dilated branches, as for ``deploy=True``. Folded weights stay unchanged."""
    folded = dict(state_dict)
    for name in state_dict:
        if not name.endswith('lk_origin.weight') or f'{name[:-6]}bias' in state_dict:
            continue
        prefix = name[: -len('lk_origin.weight')]
        weight, bias = fold_branches(state_dict, prefix, kernel_size=state_dict[name].shape[-1])
        for branch in state_dict:
            if re.match(rf'{re.escape(prefix)}(lk_origin|origin_bn|dil_conv_k\d+_\d+|dil_bn_k\d+_\d+)\.', branch):
                del folded[branch]
        folded[f'{prefix}lk_origin.weight'], folded[f'{prefix}lk_origin.bias'] = weight, bias
    return folded


def _recognise_arch(state_dict: Mapping[str, Tensor], prefix: str) -> str:
    variant = describe_variant(state_dict, prefix)
    known = {}
    for arch, settings in ARCHITECTURES.items():
        depths = (*settings['depths'], *settings['sub_depths'])
        known[f'channels {settings["channels"]}, depths {depths}'] = arch
    if variant not in known:
        raise ValueError(f'the variant must be one of {", ".join(ARCHITECTURES)}, got {variant or "no blocks"}')
    return known[variant]


def _recognise_family(state_dict: Mapping[str, Tensor], released_names: bool) -> str:
    backbone = 'backbone.'
    if released_names:
        foreign = [name for name in state_dict if name.startswith((backbone, 'neck.', 'decode_head.'))]
        if foreign:
            raise ValueError(f'the names must be flat or those of a whole model, got patch_embed1 and {foreign[0]}')
        return 'classification' if any(name.startswith('head.') for name in state_dict) else 'backbone'
    rest = {name for name in state_dict if not name.startswith(backbone)}
    if not rest:
        return 'backbone'
    if any(name.startswith('decode_head.') for name in rest):
        return 'segmentation'
    if any(name.startswith('head.head.') for name in rest):
        return 'classification'
    detection = ('rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.', 'panoptic_head.')
    if any(name.startswith(detection) for name in rest):
        return 'detection'
    tops = ', '.join(sorted({top_level(name) for name in rest})[:8])
    raise ValueError(f'the backbone has an unknown head, got {tops}')


def _check_backbone(state_dict: Mapping[str, Tensor], prefix: str, arch: str, out_type: str, deploy: bool) -> None:
    """Check that the backbone has all its weights with their shapes, and no others.

    A pyramid may lack the norms of outputs that the model does not use.
    """
    expected = _backbone_weights(arch, out_type, deploy)
    found = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if not prefix:
        found = {name: tensor for name, tensor in found.items() if top_level(name) not in CLASSIFICATION_HEADS}

    def is_optional(name: str) -> bool:
        return top_level(name) in PYRAMID_MODULES or name.endswith('num_batches_tracked')

    backbone = f'OverLoCK-{arch.upper()} ({out_type}{", folded" if deploy else ""})'
    for problem, names in (
        ('missing', [name for name in expected if name not in found and not is_optional(name)]),
        ('unknown', [name for name in found if name not in expected]),
        ('of another shape', [name for name in expected if name in found and found[name].shape != expected[name].shape]),
    ):
        if names:
            raise ValueError(f'the weights look like {backbone}, but some are {problem}: {shortened(names)}')


@functools.lru_cache(maxsize=8)
def _backbone_weights(arch: str, out_type: str, deploy: bool) -> dict[str, Tensor]:
    """Return the backbone's weights on the meta device, for their names and shapes."""
    with torch.device('meta'):
        return OverLoCK(arch, out_type=out_type, deploy=deploy).state_dict()


def classes_of(meta: Mapping) -> Optional[tuple[str, ...]]:
    """Return the names of the classes from a checkpoint's metadata, written by OpenMMLab 1.x or 2.x."""
    classes = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    if isinstance(classes, str):
        return (classes,)
    return None if classes is None else tuple(classes)
