"""Norms that OverLoCK has around its depth-wise convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._autocast import autocast_disabled, cast_as_autocast
from ._checks import (
    check_branch_norms_given,
    check_dilations,
    check_flag,
    check_layer_norm,
    check_number,
    check_optional_tensor,
    check_residual_depthwise_norm,
    check_tensor,
    check_tensors,
)
from ._library import operator, using_references
from ._modes import is_compiling
from ._reference import accumulation_type, fold_kernels
from .cuda_kernels import has_cuda_kernels
from .depthwise import depthwise_conv2d, residual_depthwise_conv2d


def branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of parallel depth-wise convolutions, each through a batch norm with the statistics of the batch.

    Given the statistics the branches are one kernel, also in training (paper section 3.2, "Dilated RepConv Layer"). The
    compiled operator takes one pass over the map for the statistics, and one convolution; it keeps ``x`` for the backward,
    and no other map. On devices without it the backward keeps ``x`` and the output of the first branch.

    Args:
        x (Tensor[B, C, H, W])
        weights (sequence of Tensor[C, 1, k, k]): a kernel for each branch, k odd, at most 8. The first reaches as far as
            any and has no dilation.
        norm_weights, norm_biases (sequences of Tensor[C]): of the branches' batch norms.
        dilations: of the branches.
        eps: of the batch norms.

    Returns:
        tuple[Tensor[B, C, H, W], Tensor[branches, C], Tensor[branches, C]]: the sum, and of each branch's output the mean
        and the biased variance, which have no gradient.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`; ``x`` has no more than one value for each channel.
    """
    check_tensor('x', x)
    weights = check_tensors('weights', weights)
    norm_weights = check_tensors('norm_weights', norm_weights)
    norm_biases = check_tensors('norm_biases', norm_biases)
    dilations = check_dilations(dilations)
    check_number('eps', eps)
    return operator('branch_norms')(cast_as_autocast(x), weights, norm_weights, norm_biases, dilations, eps)


def branch_norms_given(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    dilations: Sequence[int],
    eps: float = 1e-5,
) -> Tensor:
    """The sum of :func:`branch_norms` with given statistics: one convolution, with a kernel that is folded.

    Without gradients, folding and convolution are one operator. With gradients, autograd goes through the folding.

    Args:
        x, weights, norm_weights, norm_biases, dilations, eps: as of :func:`branch_norms`.
        mean, variance (Tensor[branches, C]): of the branches' outputs. Their dtype is that of ``x``, or float32.

    Returns:
        Tensor[B, C, H, W]: as :func:`branch_norms`.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    for name, tensor in (('x', x), ('mean', mean), ('variance', variance)):
        check_tensor(name, tensor)
    weights = check_tensors('weights', weights)
    norm_weights = check_tensors('norm_weights', norm_weights)
    norm_biases = check_tensors('norm_biases', norm_biases)
    dilations = check_dilations(dilations)
    check_number('eps', eps)
    x = cast_as_autocast(x)
    arguments = x, weights, norm_weights, norm_biases, mean, variance, dilations, eps
    if not _wants_gradient(x, *weights, *norm_weights, *norm_biases, mean, variance):
        return operator('_branch_norms_given')(*arguments)
    check_branch_norms_given(*arguments)
    statistics = norm_weights, norm_biases, mean.unbind(), variance.unbind()
    weight, bias = fold_kernels(weights, dilations, *statistics, [eps] * len(weights))
    return depthwise_conv2d(x, weight.to(weights[0].dtype), bias.to(weights[0].dtype))


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation (Woo et al., ConvNeXt V2, eq. 1-3): ``x * (gamma * n + 1) + beta``.

    n is the L2 norm of a channel's map over its mean over the channels. Sums are in float32 at least.

    Args:
        x (Tensor[B, C, H, W])
        gamma, beta (Tensor[C])
        eps: added to the mean.

    Returns:
        Tensor[B, C, H, W]: with the dtype and memory format of ``x``, also under autocast.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    check_tensor('x', x)
    check_tensor('gamma', gamma)
    check_tensor('beta', beta)
    check_number('eps', eps)
    return operator('global_response_norm')(x, gamma, beta, eps)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the channels, at every position by itself (Ba et al., 2016). Sums are in float32 at least.

    On a GPU it is an operator of its own, which keeps half maps as they are. PyTorch's makes float32 copies of them under
    autocast, and keeps those for the backward. torch.compile runs that one. The CPU runs PyTorch's too, but gives it
    bfloat16 maps as they are.

    Args:
        x (Tensor[B, C, H, W])
        weight, bias (Tensor[C])
        eps: added to the variance.

    Returns:
        Tensor[B, C, H, W]: with the dtype of ``x``, channels_last; under autocast, with the autocast dtype.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    check_tensor('x', x)
    check_tensor('weight', weight)
    check_tensor('bias', bias)
    check_number('eps', eps)
    if x.is_cuda and not is_compiling():
        out = operator('layer_norm')(cast_as_autocast(x), weight, bias, eps)
        return out.contiguous(memory_format=torch.channels_last)
    check_layer_norm(cast_as_autocast(x), weight, bias, eps)
    weight, bias = (each.to(accumulation_type(x)) for each in (weight, bias))
    takes_as_it_is = x.dtype == torch.bfloat16 and not is_compiling()
    with autocast_disabled(x.device.type) if takes_as_it_is else contextlib.nullcontext():
        out = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)
    return cast_as_autocast(out.permute(0, 3, 1, 2))


def layer_norm_of_branch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm`, and ``x`` itself, for a residual block: ``normed, x = layer_norm_of_branch(x, ...)``.

    On a GPU, the backward adds the gradients of the block's branch and of its shortcut in the kernel of the norm. Other
    devices run :func:`layer_norm`.

    Args:
        x, weight, bias, eps: as of :func:`layer_norm`.

    Returns:
        tuple[Tensor[B, C, H, W], Tensor[B, C, H, W]]: the normalised map as of :func:`layer_norm`, and ``x``.

    Raises:
        TypeError, ValueError: as :func:`layer_norm`.
    """
    for name, tensor in (('x', x), ('weight', weight), ('bias', bias)):
        check_tensor(name, tensor)
    check_number('eps', eps)
    has_kernel = x.is_cuda and has_cuda_kernels() and not is_compiling() and not using_references()
    fits = has_kernel and cast_as_autocast(x) is x and _wants_gradient(x, weight, bias)
    if not fits or not x.is_contiguous(memory_format=torch.channels_last):
        return layer_norm(x, weight, bias, eps), x
    return norm_and_input(x, weight, bias, eps)


def norm_and_input(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if has_torch_function_variadic(x):  # modes see it as one function
        return handle_torch_function(norm_and_input, (x,), x, weight, bias, eps)
    return _NormAndInput.apply(x, weight, bias, eps)


class _NormAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, mean, rstd = torch.ops.overlock_mm._layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_x: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grads = torch.ops.overlock_mm._layer_norm_backward(grad_output, x, weight, mean, rstd, grad_x)
        return grads[0], grads[1].to(weight.dtype), grads[2].to(ctx.bias_dtype), None


def residual_depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Tensor:
    """``global_response_norm(residual_depthwise_conv2d(x, weight, bias), gamma, beta, eps)``.

    Without gradients this is one operator: the compiled one sums the squares of the convolution's output on its
    way to memory, and normalises the output in place. With gradients, both operators run one after the other.

    Args:
        x (Tensor[B, C, H, W])
        weight (Tensor[C, 1, 3, 3])
        bias (Tensor[C] | None)
        gamma, beta (Tensor[C]), eps: of the norm.
        inplace: whether the result overwrites ``x``, as in PyTorch's activations. Only without gradients.

    Returns:
        Tensor[B, C, H, W]: as :func:`depthwise_conv2d`.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`; ``inplace`` with gradients, or under an autocast that casts x.
    """
    for name, tensor in (('x', x), ('weight', weight), ('gamma', gamma), ('beta', beta)):
        check_tensor(name, tensor)
    check_optional_tensor('bias', bias)
    check_number('eps', eps)
    check_flag('inplace', inplace)
    given, x = x, cast_as_autocast(x)
    tensors = [each for each in (x, weight, bias, gamma, beta) if each is not None]
    wants_gradient = _wants_gradient(*tensors)
    if inplace and (wants_gradient or x.dtype != given.dtype):
        reason = 'a gradient is asked for' if wants_gradient else f'autocast makes {x.dtype} of {given.dtype}'
        raise ValueError(f'inplace must be False where {reason}, got True')
    if wants_gradient:
        check_residual_depthwise_norm(x, weight, bias, gamma, beta, eps)
        return global_response_norm(residual_depthwise_conv2d(x, weight, bias), gamma, beta, eps)
    if inplace:
        operator('residual_depthwise_norm_')(x, weight, bias, gamma, beta, eps)
        return x
    return operator('residual_depthwise_norm')(x, weight, bias, gamma, beta, eps)


def gelu_residual_depthwise_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float = 1e-6
) -> Tensor:
    """``residual_depthwise_norm(gelu(x), weight, bias, gamma, beta, eps)``: the middle of an MLP, for training.

    The compiled operator keeps ``x`` for the backward, and no other map: those between the layers are made again. On CUDA
    they are not written at all. A forward makes 3 passes over the map, and a backward makes 5.

    Args:
        x (Tensor[B, C, H, W])
        weight (Tensor[C, 1, 3, 3])
        bias (Tensor[C] | None)
        gamma, beta (Tensor[C]), eps: of the norm.

    Returns:
        Tensor[B, C, H, W]: as :func:`depthwise_conv2d`.

    Raises:
        TypeError, ValueError: as :func:`depthwise_conv2d`.
    """
    for name, tensor in (('x', x), ('weight', weight), ('gamma', gamma), ('beta', beta)):
        check_tensor(name, tensor)
    check_optional_tensor('bias', bias)
    check_number('eps', eps)
    return operator('gelu_residual_depthwise_norm')(cast_as_autocast(x), weight, bias, gamma, beta, eps)[0]


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
