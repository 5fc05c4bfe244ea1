"""Batch norms with the statistics of several processes, and buffers of norms that are updated together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops._modes import is_compiling
from ..ops.sync_norms import sync_batch_norm
from .layers import has_hooks


class _Batch(NamedTuple):
    """Norms, and the statistics of a batch that their running ones take in."""

    norms: list[nn.BatchNorm2d]
    rows: list[int]  # of each norm, among the statistics
    means: Tensor  # (rows, C)
    variances: Tensor  # (rows, C), biased
    correction: float  # of the variances
    momentum: float


class _Waiting:
    """Numbers of batches, each once, and statistics, that norms have not taken in yet."""

    def __init__(self) -> None:
        self.counters: dict[int, Tensor] = {}
        self.batches: list[_Batch] = []

    def take_in(self) -> None:
        """In one kernel of each kind, where every norm would start its own."""
        counters, batches = list(self.counters.values()), self.batches
        self.counters, self.batches = {}, []
        if counters:
            torch._foreach_add_(counters, 1)
        if batches:
            _move_running_statistics(batches)


class _State(threading.local):
    waiting: Optional[_Waiting] = None


_state = _State()


@contextlib.contextmanager
def updating_together() -> Iterator[None]:
    """Context in which norms count batches, and move their running statistics, at the end and all at once.

    On a GPU this takes a few kernels for a network. Within the context, the buffers are those of the step before.
    """
    # A trace would mix up tensors that leave the layers in this way.
    if is_compiling() or torch.jit.is_tracing() or _state.waiting is not None:
        yield
        return
    _state.waiting = _Waiting()
    try:
        yield
    finally:
        waiting, _state.waiting = _state.waiting, None
        waiting.take_in()


def count_batch(counters: Sequence[Tensor]) -> None:
    """Add 1 to the numbers of batches that norms have seen (``num_batches_tracked``)."""
    waiting = _state.waiting
    if is_compiling() or waiting is None:
        torch._foreach_add_(counters, 1)
        return
    if any(id(each) in waiting.counters for each in counters):
        waiting.take_in()  # a norm is used twice: in the right order
    waiting.counters.update({id(each): each for each in counters})


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[nn.BatchNorm2d], means: Tensor, variances: Tensor, count: Union[int, Tensor]
) -> None:
    """Let norms count a batch and move their running statistics, as they do in training.

    Args:
        norms: with C channels.
        means, variances (Tensor[norms, C]): of the batch. The variances are biased.
        count: values of a channel in the batch.
    """
    correction = count / (count - 1)
    if isinstance(correction, Tensor):
        variances, correction = variances * correction, 1.0
    for momentum in dict.fromkeys(norm.momentum for norm in norms):
        rows = [
            i
            for i, norm in enumerate(norms)
            if norm.momentum == momentum and norm.training and norm.track_running_stats and norm.running_mean is not None
        ]
        own = [norms[i] for i in rows]
        if not own:
            continue
        if momentum is None:  # the average of all batches so far
            torch._foreach_add_([norm.num_batches_tracked for norm in own], 1)
            for norm, mean, variance in zip(own, means[rows], variances[rows] * correction):
                count = norm.num_batches_tracked.to(norm.running_mean.dtype)
                for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
                    running.mul_(1 - 1 / count).add_(new.to(running.dtype) / count)
            continue
        count_batch([norm.num_batches_tracked for norm in own])
        batch = _Batch(own, rows, means, variances, correction, momentum)
        if is_compiling() or _state.waiting is None:
            _move_running_statistics([batch])
        else:
            _state.waiting.batches.append(batch)


@torch.no_grad()
def _move_running_statistics(batches: Sequence[_Batch]) -> None:
    """``running = (1 - momentum) * running + momentum * statistics``, in one kernel for each distinct factor."""
    decays: dict[float, list[Tensor]] = {}
    terms: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        for name, statistics, correction in (
            ('running_mean', batch.means, 1.0),
            ('running_var', batch.variances, batch.correction),
        ):
            running, of_norms = [getattr(norm, name) for norm in batch.norms], statistics.unbind()
            decays.setdefault(1 - batch.momentum, []).extend(running)
            new = [of_norms[row].to(old.dtype) for row, old in zip(batch.rows, running)]
            terms.setdefault(batch.momentum * correction, []).extend(zip(running, new))
    for decay, running in decays.items():
        torch._foreach_mul_(running, decay)
    for factor, pairs in terms.items():
        torch._foreach_add_([old for old, _ in pairs], [new for _, new in pairs], alpha=factor)


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
