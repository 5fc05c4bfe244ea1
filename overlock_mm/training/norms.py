"""Synchronised batch norms that do not wait for the device, in models of any kind."""

from __future__ import annotations

import torch.nn as nn

from ..models.norms import SyncBatchNorm


def convert_sync_norms(model: nn.Module) -> nn.Module:
    """Make :class:`overlock_mm.models.norms.SyncBatchNorm` of all of torch's ``SyncBatchNorm`` in a model, in place.

    The modules stay the same objects, with their parameters, buffers, hooks and settings. Only their class changes. Modules
    of derived classes are left alone.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module.
    """
    return replace_class(model, nn.SyncBatchNorm, SyncBatchNorm)


def restore_sync_norms(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_sync_norms`. It returns and raises the same."""
    return replace_class(model, SyncBatchNorm, nn.SyncBatchNorm)


def replace_class(model: nn.Module, old: type, new: type) -> nn.Module:
    """Change the class of all modules of a class, not of derived ones, in place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model
