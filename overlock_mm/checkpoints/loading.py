"""Loading released checkpoints into a backbone or a head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Optional, Union

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from torch import Tensor

from .files import check_checkpoint_name, read_checkpoint, released_state_dict

#: Top-level names of the heads in a classification checkpoint.
CLASSIFICATION_HEADS = ('head', 'aux_head')
#: Modules that only pyramids have. With a classification checkpoint they keep their initialisation.
PYRAMID_MODULES = ('extra_norm', 'h_proj')
_STAGES = ('blocks1', 'blocks2', 'blocks3', 'blocks4', 'sub_blocks3', 'sub_blocks4')


class TakesReleasedCheckpoints(BaseModule):
    """A module whose ``init_cfg=dict(type='Pretrained', checkpoint=FILE)`` is loaded by :func:`load_pretrained`.

    Attributes:
        layers_of_data: layers whose shapes follow the user's data, the channels of the image or the classes.

    Args:
        init_cfg: mmengine's config of the initialisation, or a list of them.
        kwargs: arguments of the next base class.

    Raises:
        TypeError: ``init_cfg`` is not a dict or a list of dicts, or its checkpoint is neither a str nor a path.
    """

    layers_of_data: tuple[str, ...] = ()

    def __init__(self, init_cfg: Union[dict, list[dict], None] = None, **kwargs) -> None:
        for cfg in _as_list(init_cfg):
            if not isinstance(cfg, dict):
                example = "such as dict(type='Pretrained', checkpoint=FILE)"
                raise TypeError(f'init_cfg must be a dict or a list of dicts, {example}, got {init_cfg!r}')
            if 'checkpoint' in cfg:
                check_checkpoint_name(cfg['checkpoint'])
        super().__init__(init_cfg=init_cfg, **kwargs)

    def init_weights(self) -> None:
        """Apply ``init_cfg``. A checkpoint is loaded last, after all other initialisations.

        Raises:
            ValueError: the checkpoint is of another variant, or has no weights for this module.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        pretrained = [cfg for cfg in _as_list(init_cfg) if cfg['type'] in ('Pretrained', PretrainedInit)]
        self.init_cfg = [cfg for cfg in _as_list(init_cfg) if cfg not in pretrained] or None
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for cfg in pretrained:
            load_pretrained(self, **{name: value for name, value in cfg.items() if name != 'type'})
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=f'PretrainedInit: load from {cfg["checkpoint"]}')


def _as_list(init_cfg: Union[dict, list[dict], None]) -> list[dict]:
    return init_cfg if isinstance(init_cfg, list) else [] if init_cfg is None else [init_cfg]


def load_pretrained(
    module: TakesReleasedCheckpoints,
    checkpoint: str,
    prefix: Optional[str] = None,
    map_location: str = 'cpu',
    adapt_channels: bool = False,
) -> None:
    """Load a checkpoint with the names of the release, and log the weights that were left out.

    The weights may be flat or under ``state_dict`` or ``model``. A backbone takes its weights from a classification
    checkpoint, without the heads, or from ``backbone.`` in the checkpoint of a whole model. A head takes its weights from a
    classification checkpoint. Of the module's ``layers_of_data``, those with another shape keep their initialisation.

    Args:
        module: the backbone or the head.
        checkpoint: path, address or ``overlock_mm://NAME``.
        prefix: load only the names with this prefix, as mmengine's ``Pretrained`` does. None finds the prefix.
        map_location: as in :func:`torch.load`.
        adapt_channels: whether a first convolution of an image with other channels takes the checkpoint's weights, repeated
            over the channels and scaled by old over new channels; one channel takes their sum. So a grey image gives the
            same features in any number of channels that is 1 or a multiple of the old one, and about the same in others.

    Raises:
        ValueError: the checkpoint has no weights for the module, or those of another variant.
        OSError: the file is missing or damaged, or the download failed.
    """
    state_dict = released_state_dict(read_checkpoint(checkpoint, map_location), checkpoint)
    own = module.state_dict()
    state_dict = _strip_prefix(state_dict, own, prefix)
    left_out = {name for name in state_dict if _is_of_another_model(name, own)}
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in left_out}
    if not state_dict.keys() & own.keys():
        found = _top_levels([*state_dict, *left_out]) or 'nothing'
        raise ValueError(f'{checkpoint} has no weights for {type(module).__name__}, got {found}')
    check_variant(module, state_dict, prefix='')
    adapted = _adapt_channels(state_dict, own, module.layers_of_data) if adapt_channels else []
    fresh = set()
    for name, tensor in state_dict.items():
        if name in own and own[name].shape != tensor.shape:
            if _layer(name) not in module.layers_of_data:
                expected, found = tuple(own[name].shape), tuple(tensor.shape)
                raise ValueError(f'{name} must have shape {expected}, got {found} in {checkpoint}')
            fresh.add(_layer(name))
    state_dict = {name: tensor for name, tensor in state_dict.items() if _layer(name) not in fresh}

    result = module.load_state_dict(state_dict, strict=False)
    # Old checkpoints have no num_batches_tracked. It does not change any output.
    missing = [
        name for name in result.missing_keys if not name.endswith('num_batches_tracked') and _layer(name) not in fresh
    ]
    initialised = [name for name in missing if top_level(name) in PYRAMID_MODULES]
    missing = [name for name in missing if name not in initialised]
    problems = [('lacks', missing), ('has unknown', result.unexpected_keys)]
    if any(names for _, names in problems):
        found = ' and '.join(f'it {problem} {shortened(names)}' for problem, names in problems if names)
        raise ValueError(f'{checkpoint} does not fit {type(module).__name__}: {found}')
    message = f'Loaded {len(state_dict)} tensors from {checkpoint}.'
    if left_out:
        message += f' Left out {len(left_out)} tensors of other modules: {_top_levels(left_out)}.'
    if initialised:
        message += f' Not in the checkpoint, so kept as initialised: {_top_levels(initialised)}.'
    if fresh:
        message += f' Of another shape in the checkpoint, so kept as initialised: {", ".join(sorted(fresh))}.'
    if adapted:
        message += f' Adapted to other channels: {", ".join(adapted)}.'
    print_log(message, logger='current')


def _adapt_channels(state_dict: dict[str, Tensor], own: Mapping[str, Tensor], layers: tuple[str, ...]) -> list[str]:
    """Bring kernels (C_out, C_in, k, k) of layers to the input channels of their own; return those layers."""
    adapted = []
    for name, tensor in state_dict.items():
        channels = own[name].shape[1] if name in own and own[name].ndim == 4 else None
        fits = channels is not None and own[name][:, :1].shape == tensor[:, :1].shape
        if _layer(name) in layers and fits and channels != tensor.shape[1]:
            old = tensor.shape[1]
            if channels == 1:
                state_dict[name] = tensor.sum(1, keepdim=True)
            else:
                state_dict[name] = tensor[:, [i % old for i in range(channels)]] * (old / channels)
            adapted.append(_layer(name))
    return adapted


def openmmlab_name(name: str) -> str:
    """Return the name in mmpretrain's ``ImageClassifier`` of a weight with a flat name, as released classifiers have it."""
    return f'head.{name}' if top_level(name) in CLASSIFICATION_HEADS else f'backbone.{name}'


def describe_variant(state_dict: Mapping[str, Tensor], prefix: str = '') -> Optional[str]:
    """Describe a backbone by its weights, such as 'channels (56, 112, 256, 336), depths (2, 2, 3, 2, 6, 2)'.

    The depths are in the order of ``overlock.STAGES``. The result is None for weights of another network.
    """
    try:
        channels = tuple(state_dict[f'{prefix}{stage}.0.dwconv.weight'].shape[0] for stage in _STAGES[:4])
    except KeyError:
        return None
    depths = []
    for stage in _STAGES:
        indices = (re.match(rf'{re.escape(prefix)}{stage}\.(\d+)\.', name) for name in state_dict)
        depths.append(max((int(match.group(1)) + 1 for match in indices if match), default=0))
    return f'channels {channels}, depths {tuple(depths)}'


def check_variant(backbone: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Check that the weights under a prefix of a state dict are of the backbone's variant.

    Raises:
        ValueError: they are of another variant. The message describes both.
    """
    found, expected = describe_variant(state_dict, prefix), describe_variant(backbone.state_dict())
    if found is not None and found != expected:
        raise ValueError(f'the checkpoint is of another variant: {type(backbone).__name__} has {expected}, got {found}')


def _strip_prefix(state_dict: dict[str, Tensor], own: dict[str, Tensor], prefix: Optional[str]) -> dict[str, Tensor]:
    if prefix is None:
        # Of the prefixes in a whole model's checkpoint, the one with the most names of this module.
        prefixes = ('', 'backbone.', 'head.')
        prefix = max(prefixes, key=lambda prefix: sum(f'{prefix}{name}' in state_dict for name in own))
    elif prefix:
        prefix = f'{prefix.rstrip(".")}.'
    return {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _is_of_another_model(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a weight can be left out: a head or a pyramid's norm for a backbone, anything but this head for a head."""
    own_top_levels = {top_level(other) for other in own}
    if top_level(name) in own_top_levels:
        return name not in own and top_level(name) in PYRAMID_MODULES
    return bool(own_top_levels & set(CLASSIFICATION_HEADS)) or top_level(name) in CLASSIFICATION_HEADS + PYRAMID_MODULES


def top_level(name: str) -> str:
    """Return 'blocks1' for 'blocks1.0.dwconv.weight'."""
    return name.split('.', 1)[0]


def _layer(name: str) -> str:
    """Return 'blocks1.0.dwconv' for 'blocks1.0.dwconv.weight'."""
    return name.rpartition('.')[0]


def _top_levels(names: Iterable[str]) -> str:
    return ', '.join(sorted({top_level(name) for name in names}))


def shortened(names: list[str]) -> str:
    """Return the first five names and the number of all names, for a message."""
    return ', '.join(names[:5]) + (f', ... ({len(names)} in all)' if len(names) > 5 else '')
