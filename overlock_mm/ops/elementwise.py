"""Operators on the numbers of a map, one by one, and their scales."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_optional_tensor, check_tensor
from ._library import operator
from ._modes import is_compiling, unseen_by_modes


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, ``x * Phi(x)``, where Phi is the normal distribution (Hendrycks and Gimpel, 2016).

    The compiled operator is for the CPU, where it is faster than PyTorch's (docs/notes/depthwise.md). Other devices run
    PyTorch's, and so does torch.compile, which makes one kernel of it and its neighbours.

    Args:
        x (Tensor[*])

    Returns:
        Tensor[*]: with the dtype and layout of ``x``, also under autocast.

    Raises:
        TypeError: ``x`` is not a tensor, or not of a floating-point type.
    """
    check_tensor('x', x)
    return F.gelu(x) if is_compiling() else operator('gelu')(x)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Optional[Tensor] = None, other: Optional[Tensor] = None) -> Tensor:
    """``x * scale + shift + other``, with a scale and a shift for each channel.

    On a GPU it is an operator of its own: its gradients take one pass over the maps. The CPU and torch.compile run
    PyTorch's, with parameters in the dtype of ``x``: so a map stays in half precision under autocast.

    Args:
        x (Tensor[B, C, H, W])
        scale (Tensor[C], or of another shape of C numbers; or Tensor[B, C] or [B, C, 1, 1] without a shift)
        shift (Tensor[C], or of another shape of C numbers, or None)
        other (Tensor[B, C, H, W] | None): with the dtype of ``x``.

    Returns:
        Tensor[B, C, H, W]: with the dtype and layout of ``x``. On a GPU, of a slice of channels, channels_last.
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
        return operator('scale_and_shift')(_dense(x), scale, shift, other)
    out = x * scale if shift is None else torch.addcmul(shift, x, scale)
    return out if other is None else out + other


def scaled_sum(x: Tensor, scale: Tensor, shift: Tensor, other: Tensor, other_scale: Tensor, other_shift: Tensor) -> Tensor:
    """``(x * scale + shift) + (other * other_scale + other_shift)``, with scales and shifts for each channel.

    On a GPU it is one operator. It reads channels of a larger map in their place. Elsewhere both terms are those of
    :func:`scale_and_shift`.

    Args:
        x, other (Tensor[B, C, H, W]): with one dtype.
        scale, shift, other_scale, other_shift (Tensor[C], or of another shape of C numbers)

    Returns:
        Tensor[B, C, H, W]: with the dtype of ``x``. On a GPU, channels_last.
    """
    if not x.is_cuda or is_compiling():
        return scale_and_shift(x, scale, shift) + scale_and_shift(other, other_scale, other_shift)
    with unseen_by_modes():
        scale, shift, other_scale, other_shift = (each.flatten() for each in (scale, shift, other_scale, other_shift))
    return operator('scaled_sum')(x, scale, shift, other, other_scale, other_shift)


def squeeze_excitation(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    other: Optional[Tensor] = None,
) -> Tensor:
    """``x * sigmoid(expand(gelu(reduce(mean of x))))``, with a gate for each image and channel (Hu et al., CVPR 2018).

    With another map it is ``x * gate * silu(other)``: two attentions in one. The compiled operator, for GPUs, computes the
    gates in float32 at least, in one kernel. It keeps ``x`` and ``other`` for the backward, and no other map. Other devices
    run the reference.

    Args:
        x (Tensor[B, C, H, W])
        reduce_weight (Tensor[R, C]), reduce_bias (Tensor[R]): of the first layer.
        expand_weight (Tensor[C, R]), expand_bias (Tensor[C]): of the second layer.
        other (Tensor[B, C, H, W] | None): with the dtype of ``x``.

    Returns:
        Tensor[B, C, H, W]: with the dtype and layout of ``x``.

    Raises:
        TypeError, ValueError: as :func:`overlock_mm.ops.depthwise_conv2d`.
    """
    tensors = dict(
        x=x, reduce_weight=reduce_weight, reduce_bias=reduce_bias, expand_weight=expand_weight, expand_bias=expand_bias
    )
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_optional_tensor('other', other)
    return operator('squeeze_excitation')(*tensors.values(), other)[0]


def _dense(x: Tensor) -> Tensor:
    """A slice of channels of a map has a layout of its own."""
    return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)
