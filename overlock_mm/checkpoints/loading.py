"""Loading of released checkpoints into a backbone or a head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Optional

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from torch import Tensor

from .files import read_checkpoint, released_state_dict

#: Top-level names of a classification checkpoint that belong to its heads.
CLASSIFICATION_HEADS = ('head', 'aux_head')
#: What only pyramids have: a classification checkpoint leaves it as it was initialised.
PYRAMID_MODULES = ('extra_norm', 'h_proj')
_BASIC_STAGES = ('blocks1', 'blocks2', 'blocks3', 'blocks4')
_DYNAMIC_STAGES = ('sub_blocks3', 'sub_blocks4')


class TakesReleasedCheckpoints(BaseModule):
    """A module whose ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` goes through :func:`load_pretrained`."""

    def init_weights(self) -> None:
        """Apply ``init_cfg``: other initialisations first, then the checkpoint it names, if it does.

        Raises:
            ValueError: the checkpoint is of another variant, or has no weights for this module.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        cfgs = [] if init_cfg is None else init_cfg if isinstance(init_cfg, list) else [init_cfg]
        pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained] or None
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for cfg in pretrained:
            load_pretrained(self, **{name: value for name, value in cfg.items() if name != 'type'})
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=f'PretrainedInit: load from {cfg["checkpoint"]}')


def load_pretrained(module: nn.Module, checkpoint: str, prefix: Optional[str] = None, map_location: str = 'cpu') -> None:
    """Load a released checkpoint, or one in its format, and log what was left out.

    The weights may be flat or under ``state_dict`` or ``model``. A backbone takes them from a classification checkpoint,
    less the classification heads (a pyramid's own norms stay as initialised), or from the checkpoint of a whole model,
    where they are under ``backbone.``; a head takes those of a classification checkpoint.

    Args:
        module: the backbone or the head.
        checkpoint: path or address.
        prefix: load only the names under this prefix, as mmengine's ``Pretrained`` does. Found by itself if left out.
        map_location: as in :func:`torch.load`.

    Raises:
        ValueError: the checkpoint holds no such weights, or those of another variant.
        OSError: there is no such file, or it cannot be downloaded.
    """
    state_dict = released_state_dict(read_checkpoint(checkpoint, map_location), checkpoint)
    own = module.state_dict()
    state_dict = _strip_prefix(state_dict, own, prefix)
    left_out = {name for name in state_dict if _is_of_another_model(name, own)}
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in left_out}
    if not state_dict.keys() & own.keys():
        found = _tops([*state_dict, *left_out]) or 'nothing'
        raise ValueError(f'{checkpoint} has no weights for {type(module).__name__}, got {found}')
    for name, tensor in state_dict.items():
        # Depths and widths are compared as a whole below, which says more than the first shape that differs.
        if name in own and own[name].shape != tensor.shape and describe_variant(state_dict) == describe_variant(own):
            raise ValueError(f'{name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)} in {checkpoint}')

    result = module.load_state_dict(state_dict, strict=False)
    tracked = 'num_batches_tracked'  # old checkpoints lack it; it plays no part in results
    missing = [name for name in result.missing_keys if not name.endswith(tracked)]
    initialised = [name for name in missing if top_level(name) in PYRAMID_MODULES]
    missing = [name for name in missing if name not in initialised]
    if missing or result.unexpected_keys:
        raise ValueError(
            f'{checkpoint} does not fit {type(module).__name__}: {_summary("it lacks", missing)}'
            f'{_summary("it has unknown", result.unexpected_keys)}'
        )
    message = f'Loaded {len(state_dict)} tensors from {checkpoint}.'
    if left_out:
        message += f' Left out {len(left_out)} that only other models have: {_tops(left_out)}.'
    if initialised:
        message += f' Not in it, so left as initialised: {_tops(initialised)}.'
    print_log(message, logger='current')


def openmmlab_name(name: str) -> str:
    """Name in mmpretrain's ``ImageClassifier`` of a weight that has a flat name, as in released classifiers."""
    return f'head.{name}' if top_level(name) in CLASSIFICATION_HEADS else f'backbone.{name}'


def describe_variant(state_dict: Mapping[str, Tensor], prefix: str = '') -> Optional[str]:
    """Channels and depths that the names and shapes of a backbone's weights show; None if they are not OverLoCK's.

    It reads 'channels (56, 112, 256, 336), depths (2, 2, 3, 2, 6, 2)', the depths in the order of ``overlock.STAGES``.
    """
    try:
        channels = tuple(state_dict[f'{prefix}{stage}.0.dwconv.weight'].shape[0] for stage in _BASIC_STAGES)
    except KeyError:
        return None
    depths = []
    for stage in _BASIC_STAGES + _DYNAMIC_STAGES:
        indices = (re.match(rf'{re.escape(prefix)}{stage}\.(\d+)\.', name) for name in state_dict)
        depths.append(max((int(match.group(1)) + 1 for match in indices if match), default=0))
    return f'channels {channels}, depths {tuple(depths)}'


def check_variant(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse the weights, under ``prefix`` of a state dict, of another variant than the backbone's.

    Raises:
        ValueError: they are of another variant; the message describes both.
    """
    there, here = describe_variant(state_dict, prefix), describe_variant(backbone.state_dict())
    if there is not None and there != here:
        raise ValueError(f'the checkpoint is of another variant, with {there}; {type(backbone).__name__} has {here}')


def _strip_prefix(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: Optional[str]
) -> Mapping[str, Tensor]:
    if prefix is None:
        # The prefix, of those that a whole model may have, under which most of this module's names are.
        prefixes = ('', 'backbone.', 'head.')
        prefix = max(prefixes, key=lambda prefix: sum(f'{prefix}{name}' in state_dict for name in own))
    elif prefix:
        prefix = f'{prefix.rstrip(".")}.'
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _is_of_another_model(name: str, own: Mapping[str, Tensor]) -> bool:
    """A classification head in a backbone, a pyramid's norms in a plain one; the backbone or another head in a head."""
    tops = {top_level(other) for other in own}
    if top_level(name) in tops:
        return name not in own and top_level(name) in PYRAMID_MODULES
    return bool(tops & set(CLASSIFICATION_HEADS)) or top_level(name) in CLASSIFICATION_HEADS + PYRAMID_MODULES


def top_level(name: str) -> str:
    """'blocks1' of 'blocks1.0.dwconv.weight'."""
    return name.split('.', 1)[0]


def _tops(names: Iterable[str]) -> str:
    return ', '.join(sorted({top_level(name) for name in names}))


def _summary(verb: str, names: list[str]) -> str:
    if not names:
        return ''
    return f'{verb} {len(names)} tensors ({shortened(names)}). '


def shortened(names: list[str]) -> str:
    """The first five names, for a message."""
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
