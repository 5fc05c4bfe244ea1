"""A trained model as a copy for inference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.blocks import BasicBlock, DynamicBlock
from ..models.layers import GELU, AdaptiveAvgPool2d, Conv2d, DepthwiseConv, ResidualDepthwiseConv, has_hooks, is_sharded
from ..models.norms import SyncBatchNorm
from ..models.overlock import OverLoCK
from ..training import unfuse
from .blocks import FoldedBasicBlock, FoldedDynamicBlock
from .convolution import FoldedConv2d, fold_sequence

Model = TypeVar('Model', bound=nn.Module)


@torch.no_grad()
def optimize(model: Model) -> Model:
    """A copy of a model for inference: the same function to rounding, faster and in less memory.

    In every OverLoCK of the model, batch norms, LayerScales and parallel branches are folded into convolutions, and blocks
    overwrite their own maps. On the CPU the weights of convolutions are packed in oneDNN's layout. The rest of the model is
    copied as it is.

    The copy is a snapshot: later changes of the model do not reach it. It cannot be trained, and its state dict has names
    of its own. A block with a layer that was replaced, wrapped or given a hook is copied as it is.

    Args:
        model: a backbone, or a whole model of mmdet, mmseg or mmpretrain, in any mode, on any device.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no OverLoCK in the model, or the model is sharded by FSDP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    if any(is_sharded(module) for module in model.modules()):
        raise ValueError(f'model must not be sharded by FSDP, got {type(model).__name__}: gather its weights first')
    model = unfuse(_copy(model.module if is_model_wrapper(model) else model)).eval().requires_grad_(False)
    backbones = [module for module in model.modules() if isinstance(module, OverLoCK)]
    if not backbones:
        raise ValueError(f'model must be or contain an OverLoCK, got {type(model).__name__} without one')
    for backbone in backbones:
        _optimize_backbone(backbone)
    return model


def _copy(model: Model) -> Model:
    """A deep copy. A weight that a hook computes (pruning, ``weight_norm``) is no leaf, which deepcopy refuses."""
    values = [value for module in model.modules() for value in vars(module).values()]
    computed = {id(each): each.detach().clone() for each in values if isinstance(each, Tensor) and not each.is_leaf}
    return copy.deepcopy(model, computed)


#: How a part of a backbone is folded.
_FOLD: dict[type, Callable[[nn.Module], nn.Module]] = {
    BasicBlock: FoldedBasicBlock,
    DynamicBlock: FoldedDynamicBlock,
    Conv2d: FoldedConv2d,
    nn.Sequential: fold_sequence,
}


def _optimize_backbone(backbone: OverLoCK) -> None:
    backbone.memory, backbone.checkpointed_stages = 'fast', frozenset()
    with torch.device('meta'):
        fresh = OverLoCK(
            backbone.arch, backbone.in_channels, backbone.out_type, backbone.out_indices, deploy=backbone.deploy
        )
    left, names = [], _parts_of(fresh)
    for name in names:
        try:
            part = backbone.get_submodule(name)
        except AttributeError:  # it was removed
            continue
        as_built = fresh.get_submodule(name)
        if any(isinstance(module, FoldedConv2d) for module in part.modules()):
            continue  # the model was optimized before
        if _signature(part) == _signature(as_built) and not any(has_hooks(module) for module in part.modules()):
            parent, _, key = name.rpartition('.')
            backbone.get_submodule(parent).add_module(key, _FOLD[type(as_built)](part).eval().requires_grad_(False))
        else:
            left.append(name)
    if left:
        level = logging.WARNING if left == names else logging.INFO
        print_log(f'Not as they were built, so left as they are: {", ".join(left)}.', logger='current', level=level)


def _parts_of(backbone: OverLoCK) -> list[str]:
    """Names of blocks, and of convolutions between blocks."""
    names: list[str] = []
    for name, module in backbone.named_modules():
        if type(module) in _FOLD and not any(name.startswith(f'{other}.') for other in names):
            names.append(name)
    return names


def _signature(part: nn.Module) -> object:
    """All that decides what a part computes, except the values of its weights."""
    layers = [
        (name, _kind(module), module.extra_repr() if type(module) in _WITH_SETTINGS else None)
        for name, module in part.named_modules()
    ]
    return layers, {name: tensor.shape for name, tensor in part.state_dict().items()}


_WITH_SETTINGS = (nn.Conv2d, Conv2d, DepthwiseConv, ResidualDepthwiseConv, GELU, nn.AdaptiveAvgPool2d, AdaptiveAvgPool2d)


def _kind(module: nn.Module) -> type:
    """The type. All batch norms are the same at inference, such as synchronised ones and those of mmengine."""
    is_batch_norm = isinstance(module, _BatchNorm) and type(module).forward in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
        SyncBatchNorm.forward,
    )
    return _BatchNorm if is_batch_norm else type(module)
