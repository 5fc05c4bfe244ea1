"""Loading of released checkpoints into a backbone or a head."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Optional

import torch.nn as nn
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor

#: Top-level names of a classification checkpoint that belong to its heads.
CLASSIFICATION_HEADS = ('head', 'aux_head')
#: What only pyramids have: a classification checkpoint leaves it as it was initialised.
PYRAMID_MODULES = ('extra_norm', 'h_proj')


def load_pretrained(module: nn.Module, checkpoint: str, prefix: Optional[str] = None, map_location: str = 'cpu') -> None:
    """Load a released checkpoint, or one in its format, and log what was left out.

    The weights may be flat or under ``state_dict`` or ``model``. A backbone takes them from a classification checkpoint,
    less the classification heads (a pyramid's own norms stay as initialised), or from a detection or segmentation
    checkpoint (names that begin with ``backbone.``); a head takes those of a classification checkpoint.

    Args:
        module: the backbone or the head.
        checkpoint: path or address.
        prefix: load only the names under this prefix, as mmengine's ``Pretrained`` does. Found by itself if left out.
        map_location: as in :func:`torch.load`.

    Raises:
        ValueError: the checkpoint holds no such weights, or those of another variant.
    """
    content = CheckpointLoader.load_checkpoint(checkpoint, map_location=map_location, logger='current')
    state_dict = _strip_prefix(released_state_dict(content, checkpoint), module, prefix, checkpoint)
    own = module.state_dict()
    left_out = {name: tensor for name, tensor in state_dict.items() if _may_be_left_out(name, own)}
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in left_out}

    _check_variant(module, state_dict, checkpoint)
    result = module.load_state_dict(state_dict, strict=False)
    tracked = 'num_batches_tracked'  # old checkpoints lack it; it plays no part in results
    missing = [name for name in result.missing_keys if not name.endswith(tracked)]
    initialised = [name for name in missing if _top(name) in PYRAMID_MODULES]
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


def released_state_dict(content: Any, checkpoint: str) -> OrderedDict[str, Tensor]:
    """The weights in the content of a checkpoint: flat, or under ``state_dict`` or ``model``.

    Raises:
        ValueError: there are none.
    """
    state_dict = content
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state_dict = content[key]
            break
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f'{checkpoint} holds no weights, neither flat nor under state_dict or model; got {found}')
    # DistributedDataParallel puts "module." before every name.
    return OrderedDict((re.sub(r'^module\.', '', name), value) for name, value in state_dict.items())


def describe_variant(state_dict: Mapping[str, Tensor]) -> Optional[str]:
    """Channels and depths that the names and shapes of a backbone's weights show; None if they are not OverLoCK's.

    It reads 'channels (56, 112, 256, 336), depths (2, 2, 3, 2, 6, 2)', in the order of ``overlock.STAGES``.
    """
    try:
        channels = tuple(state_dict[f'{stage}.0.dwconv.weight'].shape[0] for stage in _BASIC_STAGES)
    except KeyError:
        return None
    depths = []
    for stage in (*_BASIC_STAGES, 'sub_blocks3', 'sub_blocks4'):
        indices = (re.match(rf'{stage}\.(\d+)\.', name) for name in state_dict)
        depths.append(max((int(match.group(1)) + 1 for match in indices if match), default=0))
    return f'channels {channels}, depths {tuple(depths)}'


_BASIC_STAGES = ('blocks1', 'blocks2', 'blocks3', 'blocks4')


def _check_variant(module: nn.Module, state_dict: Mapping[str, Tensor], checkpoint: str) -> None:
    own = module.state_dict()
    there, here = describe_variant(state_dict), describe_variant(own)
    if here is not None and there != here:
        found = f'of another variant, with {there}' if there else f'none of OverLoCK, with {_tops(state_dict)}'
        raise ValueError(f'{checkpoint} is {found}; {type(module).__name__} has {here}')
    for name, tensor in state_dict.items():
        # A folded file or model differs here, and the convolutions themselves deal with it.
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(f'{name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)} in {checkpoint}')


def _strip_prefix(
    state_dict: Mapping[str, Tensor], module: nn.Module, prefix: Optional[str], checkpoint: str
) -> Mapping[str, Tensor]:
    if prefix is None:
        own = {_top(name) for name in module.state_dict()}
        if own & {_top(name) for name in state_dict}:
            return state_dict
        prefix = 'backbone'
    prefix = f'{prefix.rstrip(".")}.'
    stripped = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if not stripped:
        raise ValueError(f'{checkpoint} has no weights for {type(module).__name__}, got {_tops(state_dict) or "nothing"}')
    return stripped


def _may_be_left_out(name: str, own: Mapping[str, Tensor]) -> bool:
    """Weights of the other flavours: the heads in a backbone, a pyramid's norms in a plain one, the backbone in a head."""
    if name in own:
        return False
    if any(_top(other) in CLASSIFICATION_HEADS for other in own):
        return _top(name) not in CLASSIFICATION_HEADS
    return _top(name) in CLASSIFICATION_HEADS + PYRAMID_MODULES


def _top(name: str) -> str:
    return name.split('.', 1)[0]


def _tops(names) -> str:
    return ', '.join(sorted({_top(name) for name in names}))


def _summary(verb: str, names: list[str]) -> str:
    if not names:
        return ''
    shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
    return f'{verb} {len(names)} tensors ({shown}). '
