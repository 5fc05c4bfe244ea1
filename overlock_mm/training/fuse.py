"""A model whose layers run together where one operator does the work of several in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.nn as nn
from torch import Tensor

from ..models.layers import GELU, GlobalResponseNorm, ResidualDepthwiseConv, is_as_built
from ..ops import gelu_residual_depthwise_norm
from .norms import convert_sync_norms, replace_class, restore_sync_norms

Model = TypeVar('Model', bound=nn.Module)


def fuse(model: Model) -> Model:
    """Let layers of a model run together, where one operator takes fewer passes over a map than they do. In place.

    In an ``nn.Sequential``, GELU, residual depth-wise convolution and response norm, one after the other, become one call
    of :func:`overlock_mm.ops.gelu_residual_depthwise_norm`: the middle of OverLoCK's MLPs. torch's ``SyncBatchNorm``
    becomes :class:`overlock_mm.models.norms.SyncBatchNorm`, for which the host does not wait. Outputs and gradients are
    the same to rounding. Modules, parameters and the names of the state dict stay what they are. A layer that was
    replaced, wrapped or given a hook, before or after this call, is called by itself, and so are its neighbours.

    Args:
        model: a backbone, or a whole model, also one that is wrapped for several processes.

    Returns:
        ``model``. A second call changes nothing, and :func:`unfuse` undoes it.

    Raises:
        TypeError: ``model`` is no module.
    """
    convert_sync_norms(model)
    for module in model.modules():
        if type(module) is nn.Sequential and any(_is_middle_of_mlp(layers) for layers in _triples(module)):
            module.__class__ = FusedSequential
    return model


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`, in place.

    Raises:
        TypeError: ``model`` is no module.
    """
    restore_sync_norms(model)
    return replace_class(model, FusedSequential, nn.Sequential)


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` in which every GELU, residual depth-wise convolution and response norm run as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            if _is_middle_of_mlp(layers[:3]):
                _, conv, norm = layers[:3]
                del layers[:3]
                gamma, beta = norm.gamma.flatten(), norm.beta.flatten()
                x = gelu_residual_depthwise_norm(x, conv.weight, conv.bias, gamma, beta, norm.eps)
            else:
                x = layers.pop(0)(x)
        return x


def _triples(layers: nn.Sequential) -> list[Sequence[nn.Module]]:
    """Every three layers that stand one after the other."""
    return list(zip(list(layers), list(layers)[1:], list(layers)[2:]))


def _is_middle_of_mlp(layers: Sequence[nn.Module]) -> bool:
    """Whether reading the tensors of these layers does what calling them does."""
    return (
        len(layers) == 3
        and is_as_built(layers[0], (GELU,))
        and is_as_built(layers[1], (ResidualDepthwiseConv,), 'weight', 'bias')
        and is_as_built(layers[2], (GlobalResponseNorm,), 'gamma', 'beta')
    )
