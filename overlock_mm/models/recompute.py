"""Activation checkpointing of blocks with batch norms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

try:
    from torch.compiler import is_compiling
except ImportError:  # torch < 2.3
    from torch._dynamo import is_compiling


def checkpoint_block(block: nn.Module, *inputs):
    """Run ``block(*inputs)``, keep only the inputs, and compute the block again in the backward.

    The second run must give the first one's values and leave no second trace: batch norms normalise with the batch again,
    but their running statistics are updated by the first run only.
    """

    if is_compiling():
        # torch.compile traces the block once and updates the statistics once; it knows no context_fn.
        return checkpoint(block, *inputs, use_reentrant=False)

    def contexts():
        return contextlib.nullcontext(), _statistics_at_rest(block)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics, which are thrown away."""
    kept = [
        (norm, name, buffer)
        for norm in block.modules()
        if isinstance(norm, _BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
