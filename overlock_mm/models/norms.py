"""Batch norms with the statistics of several processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.sync_norms import sync_batch_norm


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's ``SyncBatchNorm`` without waiting for the device, and also on the CPU.

    torch's has the host wait three times in a step, and the lean policy (``economy.py``) keeps its output. Results,
    parameters, buffers and settings are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to (B, C, ...)."""
        group = exchanging_group(self)
        if group is None:
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        running_mean, running_var, momentum = None, None, 0.0
        if self.track_running_stats and self.running_mean is not None:
            running_mean, running_var = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
            # Without a momentum it is the average of all batches so far.
            momentum = 1 / self.num_batches_tracked.to(running_mean.dtype) if self.momentum is None else self.momentum
        return sync_batch_norm(x, running_mean, running_var, self.weight, self.bias, momentum, self.eps, group)


def exchanging_group(norm: _BatchNorm) -> Any:
    """The process group with which a norm exchanges its statistics now, or None if it does not."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
