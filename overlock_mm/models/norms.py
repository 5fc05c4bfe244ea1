"""Batch norms with the statistics of several processes, and numbers of batches that are counted together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops._modes import is_compiling
from ..ops.sync_norms import sync_batch_norm
from .layers import has_hooks


class _State(threading.local):
    counters: Optional[dict[int, Tensor]] = None


_state = _State()


@contextlib.contextmanager
def counting_together() -> Iterator[None]:
    """Context in which :func:`count_batch` waits for the end, and then adds to all numbers at once.

    On a GPU this is one kernel for all norms of a network, where each would start one.
    """
    if is_compiling() or _state.counters is not None:
        yield
        return
    _state.counters = {}
    try:
        yield
    finally:
        counters, _state.counters = list(_state.counters.values()), None
        if counters:
            torch._foreach_add_(counters, 1)


def count_batch(counters: Sequence[Tensor]) -> None:
    """Add 1 to the numbers of batches that norms have seen (``num_batches_tracked``)."""
    waiting = _state.counters
    if is_compiling() or waiting is None or any(id(each) in waiting for each in counters):  # of a norm that is used twice
        torch._foreach_add_(counters, 1)
    else:
        waiting.update({id(each): each for each in counters})


class BatchNorm2d(nn.BatchNorm2d):
    """torch's ``BatchNorm2d``, whose batches may be counted together with those of other norms."""

    def forward(self, x: Tensor) -> Tensor:
        # Without a momentum, the number of batches is a factor of the running statistics.
        counts = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if not counts or self.momentum is None or is_compiling() or has_hooks(self):
            return super().forward(x)
        self._check_input_dim(x)
        count_batch([self.num_batches_tracked])
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps)


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
            if self.momentum is None:  # the average of all batches so far
                self.num_batches_tracked.add_(1)
                momentum = 1 / self.num_batches_tracked.to(running_mean.dtype)
            else:
                count_batch([self.num_batches_tracked])
                momentum = self.momentum
        return sync_batch_norm(x, running_mean, running_var, self.weight, self.bias, momentum, self.eps, group)


def exchanging_group(norm: _BatchNorm) -> Any:
    """The process group with which a norm exchanges its statistics now, or None if it does not."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
