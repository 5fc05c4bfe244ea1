"""Checks of the operators' arguments for the references: the same as csrc/checks.cpp, with the same messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALF_TYPES = (torch.float16, torch.bfloat16)
_MOST_BRANCHES = 8
_LARGEST_SIZE = 2**31 - 1  # products of two sizes have 64 bits


# What the dispatcher would refuse with messages of its own: checked before every call of an operator.


def check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a Tensor, got {type(tensor).__name__}')


def check_optional_tensor(name: str, tensor: Any) -> None:
    if tensor is not None and not isinstance(tensor, Tensor):
        raise TypeError(f'{name} must be a Tensor or None, got {type(tensor).__name__}')


def check_tensors(name: str, tensors: Any) -> list[Tensor]:
    tensors = _check_sequence(name, tensors, 'tensors')
    for tensor in tensors:
        check_tensor(name, tensor)
    return tensors


def check_dilations(dilations: Any) -> list[int]:
    dilations = _check_sequence('dilations', dilations, 'ints')
    for dilation in dilations:
        check_dilation(dilation, 'dilations')
    return dilations


def _check_sequence(name: str, values: Any, kind: str) -> list:
    if not isinstance(values, Iterable):
        raise TypeError(f'{name} must be a sequence of {kind}, got {type(values).__name__}')
    return list(values)


def check_dilation(dilation: Any, name: str = 'dilation') -> None:
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        kind = 'an int' if name == 'dilation' else 'ints'
        raise ValueError(f'{name} must be {kind} of at least 1, got {dilation!r}')
    if dilation > _LARGEST_SIZE:
        raise ValueError(f'{name} must be at most {_LARGEST_SIZE}, got {dilation}')


def check_size(name: str, size: Any) -> None:
    # SymInt: sizes under torch.compile may be symbolic.
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f'{name} must be an int, got {size!r}')
    if size < 1:
        raise ValueError(f'{name} must be at least 1, got {size}')
    if size > _LARGEST_SIZE:
        raise ValueError(f'{name} must be at most {_LARGEST_SIZE}, got {size}')


def check_number(name: str, number: Any) -> None:
    if not isinstance(number, (int, float, torch.SymFloat)):
        raise TypeError(f'{name} must be a number, got {number!r}')


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f'{name} must be True or False, got {flag!r}')


# What all operators have.


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')


def _check_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.ndim != rank:
        raise ValueError(f'{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}')


def _check_device(name: str, tensor: Tensor, reference: Tensor, reference_name: str) -> None:
    if tensor.device != reference.device:
        raise ValueError(f'{name} must be on the device of {reference_name}, {reference.device}, got {tensor.device}')


def _check_dtype(name: str, tensor: Tensor, reference: Tensor, reference_name: str, parameter: bool) -> None:
    """A parameter may be float32 beside half types."""
    may_be_float = parameter and reference.dtype in _HALF_TYPES
    if tensor.dtype != reference.dtype and not (may_be_float and tensor.dtype == torch.float32):
        wanted = f'{reference.dtype} or torch.float32' if may_be_float else reference.dtype
        raise TypeError(f'{name} must have dtype {wanted} with {reference_name} of {reference.dtype}, got {tensor.dtype}')


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f'{name} must have shape {shape}, got {tuple(tensor.shape)}')


# ContMix.


def check_contmix(
    value: Tensor,
    query: Tensor,
    key: Tensor,
    proj_weight: Tensor,
    proj_bias: Optional[Tensor],
    rpb_small: Optional[Tensor],
    rpb_large: Optional[Tensor],
    *,
    num_groups: int,
    small_kernel_size: int,
    large_kernel_size: int,
    scale: float = 1.0,
) -> None:
    parameters = dict(proj_weight=proj_weight, proj_bias=proj_bias, rpb_small=rpb_small, rpb_large=rpb_large)
    _check_contmix_types(dict(value=value, query=query, key=key), parameters)
    for name, tensor in (('value', value), ('query', query)):
        _check_rank(name, tensor, 4)
    batch, channels, height, width = value.shape
    if channels == 0 or channels % (2 * num_groups):
        raise ValueError(f'value must have channels divisible by 2 * num_groups = {2 * num_groups}, got {channels}')
    if (query.shape[0], *query.shape[2:]) != (batch, height, width):
        raise ValueError(
            f'query must have the batch and map of value, ({batch}, *, {height}, {width}), got shape {tuple(query.shape)}'
        )
    _check_contmix_shapes(query, key, parameters, num_groups, small_kernel_size, large_kernel_size)


def check_contmix_kernels(
    query: Tensor,
    key: Tensor,
    proj_weight: Tensor,
    proj_bias: Optional[Tensor],
    rpb_small: Optional[Tensor],
    rpb_large: Optional[Tensor],
    *,
    num_groups: int,
    small_kernel_size: int,
    large_kernel_size: int,
) -> None:
    parameters = dict(proj_weight=proj_weight, proj_bias=proj_bias, rpb_small=rpb_small, rpb_large=rpb_large)
    _check_contmix_types(dict(query=query, key=key), parameters)
    _check_contmix_shapes(query, key, parameters, num_groups, small_kernel_size, large_kernel_size)


def _check_contmix_types(maps: dict[str, Tensor], parameters: dict[str, Optional[Tensor]]) -> None:
    """All tensors must fit the first map."""
    reference_name, reference = next(iter(maps.items()))
    _check_floating(reference_name, reference)
    for name, tensor in {**maps, **parameters}.items():
        if tensor is not None:
            _check_device(name, tensor, reference, reference_name)
            _check_dtype(name, tensor, reference, reference_name, parameter=name in parameters)


def _check_contmix_shapes(
    query: Tensor,
    key: Tensor,
    parameters: dict[str, Optional[Tensor]],
    num_groups: int,
    small_kernel_size: int,
    large_kernel_size: int,
) -> None:
    for name, tensor, rank in (('query', query, 4), ('key', key, 4), ('proj_weight', parameters['proj_weight'], 2)):
        _check_rank(name, tensor, rank)
    batch, channels, height, width = query.shape
    if channels == 0 or channels % num_groups:
        raise ValueError(f'query must have channels divisible by num_groups = {num_groups}, got {channels}')
    if tuple(key.shape[:2]) != (batch, channels):
        raise ValueError(f'key must have shape ({batch}, {channels}, S, S), got {tuple(key.shape)}')
    for name, kernel_size in (('small_kernel_size', small_kernel_size), ('large_kernel_size', large_kernel_size)):
        if kernel_size % 2 == 0:
            raise ValueError(f'{name} must be odd, got {kernel_size}')
        if kernel_size > min(height, width):
            raise ValueError(f"{name} must be at most the map's smaller side, {min(height, width)}, got {kernel_size}")
    slots, tokens = small_kernel_size**2 + large_kernel_size**2, key.shape[2] * key.shape[3]
    shapes = dict(
        proj_weight=(slots, tokens),
        proj_bias=(slots,),
        rpb_small=(num_groups, 2 * small_kernel_size - 1, 2 * small_kernel_size - 1),
        rpb_large=(num_groups, 2 * large_kernel_size - 1, 2 * large_kernel_size - 1),
    )
    for name, tensor in parameters.items():
        if tensor is not None:
            _check_shape(name, tensor, shapes[name])


def check_gelu(x: Tensor) -> None:
    _check_floating('x', x)


# The other operators, of a map x (B, C, H, W).


def _check_map(x: Tensor) -> None:
    _check_floating('x', x)
    _check_rank('x', x, 4)


def _check_parameter(name: str, parameter: Tensor, x: Tensor, shape: Optional[Sequence[int]] = None) -> None:
    """One number for a channel, if there is no other shape."""
    _check_device(name, parameter, x, 'x')
    _check_dtype(name, parameter, x, 'x', parameter=True)
    _check_shape(name, parameter, tuple(x.shape[1:2] if shape is None else shape))


def _check_kernel(name: str, weight: Tensor, x: Tensor) -> None:
    channels, size = x.shape[1], weight.shape[-1] if weight.ndim else 0
    if tuple(weight.shape) != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(f'{name} must have shape ({channels}, 1, k, k) with k odd, got {tuple(weight.shape)}')
    _check_device(name, weight, x, 'x')
    _check_dtype(name, weight, x, 'x', parameter=True)


def check_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int, residual: bool) -> None:
    _check_map(x)
    _check_kernel('weight', weight, x)
    check_dilation(dilation)
    if bias is not None:
        _check_parameter('bias', bias, x)


def check_branches(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> None:
    _check_map(x)
    branches = len(weights)
    if not 1 <= branches <= _MOST_BRANCHES:
        raise ValueError(f'weights must be 1 to {_MOST_BRANCHES} kernels, got {branches}')
    if len(dilations) != branches:
        raise ValueError(f'dilations must be a number for each of {branches} weights, got {list(dilations)}')
    for weight, dilation in zip(weights, dilations):
        _check_kernel('weights', weight, x)
        check_dilation(dilation)
    if dilations[0] != 1:
        raise ValueError(f'the first branch must have no dilation, got dilations {list(dilations)}')
    kernel_sizes = [weight.shape[-1] for weight in weights]
    reaches = [(kernel_size - 1) * dilation for kernel_size, dilation in zip(kernel_sizes, dilations)]
    if max(reaches) > reaches[0]:
        raise ValueError(
            f'the first branch must reach as far as any, got kernel sizes {kernel_sizes} and dilations {list(dilations)}'
        )


def _check_norm_parameters(name: str, parameters: Sequence[Tensor], x: Tensor, branches: int) -> None:
    if len(parameters) != branches:
        raise ValueError(f'{name} must be a tensor for each of {branches} weights, got {len(parameters)}')
    for parameter in parameters:
        _check_parameter(name, parameter, x)


def _check_branch_statistics(name: str, statistics: Tensor, x: Tensor, branches: int) -> None:
    _check_device(name, statistics, x, 'x')
    _check_dtype(name, statistics, x, 'x', parameter=True)
    _check_shape(name, statistics, (branches, x.shape[1]))


def _check_other_map(name: str, other: Tensor, x: Tensor) -> None:
    """A gradient, or a map that is added."""
    _check_device(name, other, x, 'x')
    _check_dtype(name, other, x, 'x', parameter=False)
    if other.shape != x.shape:
        raise ValueError(f'{name} must have the shape of x, {tuple(x.shape)}, got {tuple(other.shape)}')


def _check_grad_output(grad_output: Tensor, x: Tensor) -> None:
    _check_other_map('grad_output', grad_output, x)


def check_branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float,
) -> None:
    check_branches(x, weights, dilations)
    _check_norm_parameters('norm_weights', norm_weights, x, len(weights))
    _check_norm_parameters('norm_biases', norm_biases, x, len(weights))
    if x.numel() <= x.shape[1]:
        raise ValueError(f'x must have more than one value for each channel, got shape {tuple(x.shape)}')


def check_sync_branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
) -> None:
    check_branches(x, weights, dilations)
    _check_norm_parameters('norm_weights', norm_weights, x, len(weights))
    _check_norm_parameters('norm_biases', norm_biases, x, len(weights))


def check_branch_norms_given(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    dilations: Sequence[int],
    eps: float,
) -> None:
    check_branches(x, weights, dilations)
    _check_norm_parameters('norm_weights', norm_weights, x, len(weights))
    _check_norm_parameters('norm_biases', norm_biases, x, len(weights))
    _check_branch_statistics('mean', mean, x, len(weights))
    _check_branch_statistics('variance', variance, x, len(weights))


def check_branch_norms_sums(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], mean: Tensor, dilations: Sequence[int]
) -> None:
    check_branches(x, weights, dilations)
    _check_grad_output(grad_output, x)
    _check_branch_statistics('mean', mean, x, len(weights))


def check_branch_norms_gradients(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    grad_mean: Tensor,
    product_mean: Tensor,
    dilations: Sequence[int],
    eps: float,
) -> None:
    check_branches(x, weights, dilations)
    _check_norm_parameters('norm_weights', norm_weights, x, len(weights))
    _check_grad_output(grad_output, x)
    _check_parameter('grad_mean', grad_mean, x)
    for name, statistics in dict(mean=mean, variance=variance, product_mean=product_mean).items():
        _check_branch_statistics(name, statistics, x, len(weights))


def check_scale_and_shift(x: Tensor, scale: Tensor, shift: Optional[Tensor], other: Optional[Tensor]) -> None:
    _check_map(x)
    _check_parameter('scale', scale, x, x.shape[:2] if scale.ndim == 2 and shift is None else x.shape[1:2])
    if shift is not None:
        _check_parameter('shift', shift, x)
    if other is not None:
        _check_other_map('other', other, x)


def check_scaled_sum(
    x: Tensor, scale: Tensor, shift: Tensor, other: Tensor, other_scale: Tensor, other_shift: Tensor
) -> None:
    _check_map(x)
    for name, parameter in dict(scale=scale, shift=shift, other_scale=other_scale, other_shift=other_shift).items():
        _check_parameter(name, parameter, x)
    _check_other_map('other', other, x)


def check_squeeze_excitation(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    other: Optional[Tensor],
) -> None:
    _check_map(x)
    channels, hidden = x.shape[1], reduce_weight.shape[0] if reduce_weight.ndim == 2 else 0
    _check_parameter('reduce_weight', reduce_weight, x, (hidden, channels))
    _check_parameter('reduce_bias', reduce_bias, x, (hidden,))
    _check_parameter('expand_weight', expand_weight, x, (channels, hidden))
    _check_parameter('expand_bias', expand_bias, x, (channels,))
    if other is not None:
        _check_other_map('other', other, x)


def check_gated(x: Tensor, gate: Tensor, other: Optional[Tensor]) -> None:
    _check_map(x)
    _check_parameter('gate', gate, x, x.shape[:2])
    if other is not None:
        _check_other_map('other', other, x)


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    _check_map(x)
    _check_parameter('weight', weight, x)
    _check_parameter('bias', bias, x)


def check_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
    _check_map(x)
    _check_parameter('gamma', gamma, x)
    _check_parameter('beta', beta, x)


def check_response_normed(x: Tensor, scale: Tensor, beta: Tensor) -> None:
    _check_map(x)
    _check_parameter('scale', scale, x, x.shape[:2])
    _check_parameter('beta', beta, x)


def check_residual_depthwise_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float
) -> None:
    _check_residual_depthwise(x, weight, bias)
    check_response_norm(x, gamma, beta, eps)


def check_residual_depthwise_normed(x: Tensor, weight: Tensor, bias: Optional[Tensor], scale: Tensor, beta: Tensor) -> None:
    _check_residual_depthwise(x, weight, bias)
    check_response_normed(x, scale, beta)


def _check_residual_depthwise(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    check_depthwise_conv2d(x, weight, bias, 1, True)
    if weight.shape[-1] != 3:
        raise ValueError(f'weight must have shape ({x.shape[1]}, 1, 3, 3), got {tuple(weight.shape)}')


def check_transpose(matrices: Tensor) -> None:
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f'matrices must be float32 or float64, got {matrices.dtype}')
    if matrices.ndim < 2 or not matrices.is_contiguous():
        raise ValueError(f'matrices must be contiguous, of 2 dimensions or more, got shape {tuple(matrices.shape)}')
