"""Adaptive pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import autocast_disabled
from ._modes import is_exporting


def adaptive_avg_pool2d(x: Tensor, output_size: tuple[int, int]) -> Tensor:
    """:func:`torch.nn.functional.adaptive_avg_pool2d`, also for exports and deterministic training.

    Exporters do not know PyTorch's for all sizes, and on CUDA its gradient is not deterministic. So in an export, and under
    ``torch.use_deterministic_algorithms(True)``, it is two products of matrices. Elsewhere it is PyTorch's, which is faster
    on the CPU.

    Args:
        x (Tensor[B, C, H, W])
        output_size: (h, w), at least 1.

    Returns:
        Tensor[B, C, h, w]
    """
    if is_exporting() or torch.are_deterministic_algorithms_enabled():
        return _by_products(x, output_size)
    return F.adaptive_avg_pool2d(x, output_size)


def _by_products(x: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The mean over each window: first over its rows, then over its columns."""
    height, width = x.shape[2:]
    with autocast_disabled(x.device.type):
        y = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        y = _means(height, output_size[0], x) @ y.flatten(2)  # (B, h, W * C)
        y = _means(width, output_size[1], x) @ y.unflatten(2, (width, -1))  # (B, h, w, C)
    return y.permute(0, 3, 1, 2)


def _means(size: int, windows: int, like: Tensor) -> Tensor:
    """The matrix (windows, size) whose product with ``size`` numbers is the mean of each window."""
    index = torch.arange(windows, device=like.device).unsqueeze(1)
    start, end = index * size // windows, ((index + 1) * size + windows - 1) // windows
    position = torch.arange(size, device=like.device)
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start).to(like.dtype)
