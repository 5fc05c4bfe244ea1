"""Operators on the numbers of a map, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_tensor
from ._library import operator
from ._modes import unseen_by_modes


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


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, with a number for each channel.

    Args:
        x (Tensor[B, C, H, W])
        scale, shift (Tensor[C], or of another shape of C numbers): they are rounded to the dtype of ``x``. So a map stays
            in half precision under autocast.

    Returns:
        Tensor[B, C, H, W]: with the dtype and layout of ``x``.
    """
    with unseen_by_modes():
        dtype = x.dtype
        scale, shift = (each.view(1, -1, 1, 1).to(dtype) for each in (scale, shift))
    return torch.addcmul(shift, x, scale)
