"""Operators on the numbers of a map, one by one."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._checks import check_tensor
from ._library import operator
from ._modes import is_compiling, unseen_by_modes


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, ``x * Phi(x)``, where Phi is the normal distribution (Hendrycks and Gimpel, 2016).

    The compiled operator is for the CPU, where it is faster than PyTorch's (docs/notes/depthwise.md). Other devices run
    PyTorch's.

    Args:
        x (Tensor[*])

    Returns:
        Tensor[*]: with the dtype and layout of ``x``, also under autocast.

    Raises:
        TypeError: ``x`` is not a tensor, or not of a floating-point type.
    """
    check_tensor('x', x)
    return operator('gelu')(x)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Optional[Tensor] = None) -> Tensor:
    """``x * scale + shift``, with a number for each channel.

    On a GPU it is an operator of its own: its gradients take one pass over the maps. The CPU and torch.compile run
    PyTorch's, with parameters in the dtype of ``x``: so a map stays in half precision under autocast.

    Args:
        x (Tensor[B, C, H, W])
        scale (Tensor[C], or of another shape of C numbers; or Tensor[B, C] or [B, C, 1, 1] without a shift)
        shift (Tensor[C], or of another shape of C numbers, or None)

    Returns:
        Tensor[B, C, H, W]: with the dtype and layout of ``x``.
    """
    by_image = shift is None and scale.shape[:2] == x.shape[:2]
    on_gpu = x.is_cuda and not is_compiling()
    with unseen_by_modes():
        if on_gpu:
            scale = scale.flatten(1) if by_image else scale.flatten()
            shift = None if shift is None else shift.flatten()
        elif not by_image:
            dtype = x.dtype
            scale, shift = (None if each is None else each.view(1, -1, 1, 1).to(dtype) for each in (scale, shift))
        elif scale.ndim == 2:
            scale = scale[..., None, None]
    if on_gpu:
        return operator('scale_and_shift')(x, scale, shift)
    return x * scale if shift is None else torch.addcmul(shift, x, scale)
