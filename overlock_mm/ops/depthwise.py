"""Static depth-wise convolutions, and what OverLoCK has around them, each by the fastest way there is.

On the CPU these are operators of this package where it was built with them (csrc/depthwise.cpp); on other devices, in
exports and without a binary they are made of PyTorch's own. docs/performance.md has the measurements behind the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _maps
from ._autocast import cast_as_autocast
from ._maps import DTYPES, is_channels_last
from ._overridable import overridable

#: PyTorch's forward on contiguous maps is fast for kernels that reach over no more positions, and falls off a cliff beyond.
_FAST_EXTENT = 13
#: On maps of fewer positions than these, with fewer multiply-adds, the operator here is faster, copies to channels_last and
#: back included: most of the time of PyTorch's is that of a call.
_SMALL_MAP, _SMALL_WORK = 512, 2**21


@overridable
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, dilation: int = 1) -> Tensor:
    """Depth-wise convolution of stride 1 that keeps the size of the map: zeros around it.

    On the CPU, PyTorch has no fast gradient of a depth-wise kernel, and its forward is slow for kernels that reach over
    more than 13 positions in contiguous maps, and for some of them in channels_last. All of it is fast here. Where PyTorch
    is as fast, it is what runs.

    Args:
        x (Tensor[B, C, H, W]): a map, contiguous or channels_last. The compiled operator works in channels_last: a
            contiguous map is copied to and fro.
        weight (Tensor[C, 1, k, k]): k odd.
        bias (Tensor[C] | None)
        dilation: distance of the kernel's taps.

    Returns:
        Tensor[B, C, H, W]: with the dtype and memory format of ``x``; under autocast, with the autocast dtype.

    Raises:
        TypeError: an argument is no tensor, or the dtypes do not go together.
        ValueError: a shape does not fit; the message names the argument and what it got.
    """
    x = cast_as_autocast(x)
    _check(x, weight, bias, dilation)
    if not _compiled(x) or _pytorch_is_as_fast(x, weight, dilation):
        return _conv2d(x, weight, bias, dilation)
    return torch.ops.overlock_mm._depthwise_conv2d(x, weight, bias, dilation, False, False)


@overridable
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
    x = cast_as_autocast(x)
    _check(x, weight, bias, 1)
    if gelu and weight.shape[-1] != 3:
        raise ValueError(f'weight must be (C, 1, 3, 3) with gelu, got {tuple(weight.shape)}')
    if not _compiled(x):
        y = F.gelu(x) if gelu else x
        return y + _conv2d(y, weight, bias, 1)
    return torch.ops.overlock_mm._depthwise_conv2d(x, weight, bias, 1, True, gelu)


@overridable
def branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of parallel depth-wise convolutions, each through a batch norm with the statistics of the batch.

    It keeps for the backward nothing but ``x``. Given the statistics the branches are one kernel, also in training: a pass
    over the map for the statistics, and one convolution (paper section 3.2, "Dilated RepConv Layer").

    Args:
        x (Tensor[B, C, H, W])
        weights (sequence of Tensor[C, 1, k, k]): a kernel for each branch, k odd; the first reaches as far as any and has
            no dilation.
        norm_weights, norm_biases (sequences of Tensor[C]): of the branches' batch norms.
        dilations: of the branches.
        eps: of the batch norms.

    Returns:
        tuple[Tensor[B, C, H, W], Tensor[branches, C], Tensor[branches, C]]: the sum, and of each branch's output the mean
        and the biased variance, which have no gradient.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`; there is no operator for the device of ``x``: see
        :func:`has_depthwise`.
    """
    x = cast_as_autocast(x)
    _check_map(x)
    if not has_depthwise(x):
        raise ValueError(f'x must be on a device that has the compiled operator, got {x.device}')
    _check_branches(x, weights, norm_weights, norm_biases, dilations)
    return torch.ops.overlock_mm._branch_norms(
        x,
        torch.cat([weight.flatten(1) for weight in weights], dim=1),
        torch.stack(tuple(norm_weights)),
        torch.stack(tuple(norm_biases)),
        [weight.shape[-1] for weight in weights],
        list(dilations),
        eps,
    )


def has_depthwise(x: Tensor) -> bool:
    """Whether the compiled operators run where ``x`` is; :func:`branch_norms` has no other form."""
    return _compiled(x)


@overridable
def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation (Woo et al., ConvNeXt V2, eq. 1-3): ``x * (gamma * n + 1) + beta``.

    n is the L2 norm of a channel's map over its mean over the channels. Sums are in float32 at least.

    Args:
        x (Tensor[B, C, H, W])
        gamma, beta (Tensor[C])
        eps: added to the mean.

    Returns:
        Tensor[B, C, H, W]: with the dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    _check_map(x)
    for name, parameter in (('gamma', gamma), ('beta', beta)):
        _check_parameter(name, parameter, x, (x.shape[1],))
    if _compiled(x):
        return torch.ops.overlock_mm._response_norm(x, gamma, beta, eps)[0]
    # A sum of squares over a map leaves float16's range at ordinary activations: at least float32 here.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)  # (B, C, 1, 1)
    response = response / (response.mean(dim=1, keepdim=True) + eps)
    scale = (gamma.view(1, -1, 1, 1) * response + 1).to(x.dtype)
    return torch.addcmul(beta.view(1, -1, 1, 1).to(x.dtype), x, scale)


@overridable
def residual_depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    gelu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``global_response_norm(residual_depthwise_conv2d(x, weight, bias, gelu), gamma, beta, eps)``.

    Without gradients, compiled, the norm takes place in the convolution's output, whose squares were summed on the way.

    Args:
        x (Tensor[B, C, H, W])
        weight (Tensor[C, 1, 3, 3])
        bias (Tensor[C] | None)
        gamma, beta (Tensor[C]), eps: of the norm.
        gelu: whether x goes through the exact GELU first.
        inplace: whether the result takes the place of ``x``, as for PyTorch's activations. Only without gradients.

    Returns:
        Tensor[B, C, H, W]: as :func:`depthwise_conv2d`.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`; ``inplace`` with gradients, or under an autocast that casts x.
    """
    given, x = x, cast_as_autocast(x)
    _check(x, weight, bias, 1)
    if weight.shape[-1] != 3:
        raise ValueError(f'weight must be (C, 1, 3, 3), got {tuple(weight.shape)}')
    wants_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias, gamma, beta))
    if inplace and (wants_gradient or x.dtype != given.dtype):
        reason = 'a gradient is asked for' if wants_gradient else f'autocast makes {x.dtype} of {given.dtype}'
        raise ValueError(f'inplace must be False where {reason}, got True')
    if wants_gradient or not _compiled(x):
        out = global_response_norm(residual_depthwise_conv2d(x, weight, bias, gelu), gamma, beta, eps)
        return x.copy_(out) if inplace else out
    if inplace:
        torch.ops.overlock_mm._residual_depthwise_norm_(x, weight, bias, gamma, beta, eps, gelu)
        return x
    return torch.ops.overlock_mm._residual_depthwise_norm(x, weight, bias, gamma, beta, eps, gelu)


def _compiled(x: Tensor) -> bool:
    # Asked at every call, while a map goes through the caches: is_cpu takes a seventh of device.type.
    return x.is_cpu and not _extension.is_exporting() and (not _extension.missing or _extension.compiled_for(x.device))


def _conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """PyTorch's, which wants parameters in the dtype of the map."""
    padding = dilation * (weight.shape[-1] // 2)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def _pytorch_is_as_fast(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Of contiguous maps: the compiled operator takes channels_last ones, and chooses there by itself."""
    if is_channels_last(x) or not torch.backends.mkldnn.enabled:
        return False
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and _maps.HAS_FAST_BFLOAT16):
        return False
    if x.shape[2] * x.shape[3] < _SMALL_MAP and x.numel() * weight.shape[-1] ** 2 < _SMALL_WORK:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return weight.shape[-1] == 3 and dilation == 1
    return (weight.shape[-1] - 1) * dilation + 1 <= _FAST_EXTENT


def _check(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> None:
    # What is right is seen to be right first: on a small map, asking takes as long as the convolution.
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
        shape = weight.shape
        if (
            x.ndim == len(shape) == 4
            and shape[0] == x.shape[1]
            and shape[1] == 1
            and shape[2] == shape[3]
            and shape[2] % 2 == 1
            and x.dtype == weight.dtype
            and x.dtype in DTYPES
            and x.device == weight.device
            and (bias is None or (bias.shape == shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device))
            and type(dilation) is int
            and dilation >= 1
        ):
            return
    _check_map(x)
    _check_kernel('weight', x, weight)
    if bias is not None:
        _check_parameter('bias', bias, x, (x.shape[1],), optional=True)
    _check_dilation(dilation)


def _check_map(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f'x must be a Tensor, got {type(x).__name__}')
    if x.ndim != 4:
        raise ValueError(f'x must have 4 dimensions, got shape {tuple(x.shape)}')
    if x.dtype not in DTYPES:
        raise TypeError(f'x must be float16, bfloat16, float32 or float64, got {x.dtype}')


def _check_kernel(name: str, x: Tensor, weight: Tensor) -> None:
    if isinstance(weight, Tensor):
        channels, size = x.shape[1], weight.shape[-1] if weight.ndim else 0
        if tuple(weight.shape) != (channels, 1, size, size) or size % 2 == 0:
            raise ValueError(f'{name} must have shape ({channels}, 1, k, k) with k odd, got {tuple(weight.shape)}')
    _check_parameter(name, weight, x)


def _check_parameter(
    name: str, parameter: Tensor, x: Tensor, shape: Optional[tuple[int, ...]] = None, optional: bool = False
) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f'{name} must be a Tensor{" or None" if optional else ""}, got {type(parameter).__name__}')
    if shape is not None and tuple(parameter.shape) != shape:
        raise ValueError(f'{name} must have shape {shape}, got {tuple(parameter.shape)}')
    if parameter.device != x.device:
        raise ValueError(f'{name} must be on the device of x, {x.device}, got {parameter.device}')
    half = x.dtype in (torch.float16, torch.bfloat16)
    if parameter.dtype != x.dtype and not (half and parameter.dtype == torch.float32):
        wanted = f'{x.dtype} or torch.float32' if half else x.dtype
        raise TypeError(f'{name} must have dtype {wanted} with a map of {x.dtype}, got {parameter.dtype}')


def _check_dilation(dilation: int) -> None:
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f'dilation must be an int of at least 1, got {dilation!r}')


def _check_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
) -> None:
    for weight in weights:
        _check_kernel('weights', x, weight)
    for dilation in dilations:
        _check_dilation(dilation)
    number, channels = len(weights), x.shape[1]
    if not 1 <= number <= 8 or len(dilations) != number:
        sizes = [weight.shape[-1] for weight in weights]
        raise ValueError(
            f'kernel sizes of weights and dilations must be 1 to 8 numbers each, got {sizes} and {list(dilations)}'
        )
    for name, parameters in (('norm_weights', norm_weights), ('norm_biases', norm_biases)):
        if len(parameters) != number:
            raise ValueError(f'{name} must have shape {(number, channels)}, got {(len(parameters), channels)}')
        for parameter in parameters:
            _check_parameter(name, parameter, x, (channels,))
