"""Depth-wise convolutions of stride 1."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from ._autocast import cast_as_autocast
from ._checks import check_dilation, check_flag, check_optional_tensor, check_tensor
from ._library import operator


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, dilation: int = 1) -> Tensor:
    """Depth-wise convolution of stride 1 that keeps the size of the map: zeros around it.

    On the CPU, PyTorch has no fast gradient of a depth-wise kernel, and its forward is slow for kernels that reach over
    more than 13 positions in contiguous maps, and for some of them in channels_last. The compiled operator is fast for all.
    Where measurements found PyTorch's convolution faster, the operator calls it (docs/notes/depthwise.md).

    Args:
        x (Tensor[B, C, H, W]): a map, contiguous or channels_last. The compiled operator works in channels_last: it copies
            a contiguous map to that layout and back.
        weight (Tensor[C, 1, k, k]): k odd.
        bias (Tensor[C] | None)
        dilation: distance of the kernel's taps.

    Returns:
        Tensor[B, C, H, W]: with the dtype and memory format of ``x``; under autocast, with the autocast dtype.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes do not fit together.
        ValueError: a shape does not fit; the message names the argument and what it got.
    """
    _check_tensors(x, weight, bias)
    check_dilation(dilation)
    return operator('depthwise_conv2d')(cast_as_autocast(x), weight, bias, dilation, False, False)


def residual_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, gelu: bool = False) -> Tensor:
    """``y + depthwise_conv2d(y, weight, bias)`` with y = x, or y = GELU(x): one pass over the map, forward and backward.

    Args:
        x (Tensor[B, C, H, W])
        weight (Tensor[C, 1, k, k]): k odd; 3 if ``gelu``.
        bias (Tensor[C] | None)
        gelu: whether x goes through the exact GELU first.

    Returns:
        Tensor[B, C, H, W]: as :func:`depthwise_conv2d`.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    _check_tensors(x, weight, bias)
    check_flag('gelu', gelu)
    return operator('depthwise_conv2d')(cast_as_autocast(x), weight, bias, 1, True, gelu)


def _check_tensors(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    check_tensor('x', x)
    check_tensor('weight', weight)
    check_optional_tensor('bias', bias)
