"""A model whose layers run together where one operator does the work of several in training."""

from __future__ import annotations

from typing import TypeVar

import torch.nn as nn

from ..models.blocks import BasicBlock, DynamicBlock
from ..models.layers import SqueezeExcitation
from ..models.norms import BatchNorm2d
from ..models.overlock import OverLoCK
from .blocks import (
    FusedBasicBlock,
    FusedDynamicBlock,
    FusedOverLoCK,
    FusedSequential,
    FusedSqueezeExcitation,
    is_middle_of_mlp,
)
from .norms import convert_sync_norms, replace_class, restore_sync_norms

Model = TypeVar('Model', bound=nn.Module)

#: Classes, and those that take their places.
FUSED = {
    BasicBlock: FusedBasicBlock,
    DynamicBlock: FusedDynamicBlock,
    SqueezeExcitation: FusedSqueezeExcitation,
    OverLoCK: FusedOverLoCK,
}


def fuse(model: Model) -> Model:
    """Let layers of a model run together, where one operator takes fewer passes over a map than they do. In place.

    Modules change their class:

    - In an ``nn.Sequential``, GELU, residual depth-wise convolution and response norm, one after the other, become one
      call of :func:`overlock_mm.ops.gelu_residual_depthwise_norm`: the middle of OverLoCK's MLPs.
    - A squeeze-excitation becomes one operator.
    - On a GPU, the scale of a block's shortcut and the sum with its branch are one operator, and the gradients of shortcut
      and branch are added in that of the layer norm between them.
    - Batch norms of an OverLoCK count their batches together, at the end of its forward. So do the branches beside large
      kernels, and they move their running statistics then.
    - torch's ``SyncBatchNorm`` becomes :class:`overlock_mm.models.norms.SyncBatchNorm`, for which the host does not wait.

    Outputs and gradients are the same to rounding. Modules, parameters and the names of the state dict stay what they are.
    A layer that was replaced, wrapped or given a hook, before or after this call, is called by itself, and so are its
    neighbours.

    Args:
        model: a backbone, or a whole model, also one that is wrapped for several processes.

    Returns:
        ``model``. A second call changes nothing, and :func:`unfuse` undoes it.

    Raises:
        TypeError: ``model`` is no module.
    """
    convert_sync_norms(model)
    for module in model.modules():
        if type(module) is OverLoCK:
            replace_class(module, nn.BatchNorm2d, BatchNorm2d)
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif type(module) is nn.Sequential and _has_middle_of_mlp(module):
            module.__class__ = FusedSequential
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place.

    Raises:
        TypeError: ``model`` is no module.
    """
    restore_sync_norms(model)
    for plain, fused in {**FUSED, nn.Sequential: FusedSequential, nn.BatchNorm2d: BatchNorm2d}.items():
        replace_class(model, fused, plain)
    return model


def _has_middle_of_mlp(layers: nn.Sequential) -> bool:
    layers = list(layers)
    return any(is_middle_of_mlp(layers[i : i + 3]) for i in range(len(layers)))
