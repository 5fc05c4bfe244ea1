"""What the CUDA kernels of this package cost: launches, bytes moved and multiply-adds of each operator.

The launch code states the same (csrc/cuda/*_launch.h). The tests compare launches and bytes with those of the kernels,
which an emulation runs on the host (tests/test_ops/test_cuda_*.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Optional

import torch
from torch import Tensor

#: Bytes of shared memory that a block may have (H100). Less makes tiles smaller.
SHARED_MEMORY = 232448


@dataclass
class Cost:
    """Of operators: launches, bytes moved and multiply-adds."""

    launches: int = 0
    bytes: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))


def bytes_of(tensors: Sequence[Optional[Tensor]]) -> int:
    """Bytes of tensors. What is expanded is there once."""
    return sum(
        each.element_size() * math.prod(n for n, stride in zip(each.shape, each.stride()) if stride)
        for each in tensors
        if each is not None
    )


def kind_of_convolution(weight: Tensor, dilation: Sequence[int], groups: int) -> str:
    kind = 'convolution' if groups == 1 else 'depth-wise convolution'
    size = 'x'.join(map(str, weight.shape[2:]))
    return f'{kind} {size}' + (f' dilation {dilation[0]}' if dilation[0] > 1 else '')


def cost_of(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[str, Cost]:
    """A name for a call of an operator in a list, and what it costs.

    Raises:
        NotImplementedError: the cost of the operator is not stated.
    """
    if name not in STATED:
        raise NotImplementedError(f'the cost of overlock_mm::{name} is not stated')
    cost = STATED[name](*args, outputs=outputs)
    if name in ('depthwise_conv2d', '_depthwise_conv2d_backward'):
        weight, dilation = args[1 if name[0] == 'd' else 2], args[3]
        return f'our {kind_of_convolution(weight, [dilation], 0)}{" backward" if name[0] == "_" else ""}', cost
    return name, cost


# ContMix.


def cost_of_contmix_keys(
    key: Tensor, proj_weight: Tensor, num_groups: int, scale: float, outputs: Sequence[Tensor]
) -> Cost:
    """A product of PyTorch's, and a copy: keys of a group beside each other."""
    return Cost(2, bytes_of([key, proj_weight]) + 3 * bytes_of(outputs), key.shape[:2].numel() * proj_weight.numel())


def cost_of_contmix_keys_backward(
    grad_keys: Tensor, key: Tensor, proj_weight: Tensor, scale: float, wanted: Sequence[bool], outputs: Sequence[Tensor]
) -> Cost:
    """A product for the gradient of the key, one for that of the weight of each image, and their sum."""
    macs = key.shape[:2].numel() * proj_weight.numel()
    cost = Cost()
    if wanted[0]:
        cost += Cost(1, bytes_of([grad_keys, proj_weight, key]), macs)
    if wanted[1]:
        of_images = len(key) * bytes_of([proj_weight])
        cost += Cost(2, bytes_of([grad_keys, key, proj_weight]) + 2 * of_images, macs)
    return cost


def cost_of_contmix(value: Tensor, query: Tensor, keys: Tensor, *rest: Any, outputs: Sequence[Tensor]) -> Cost:
    """One kernel (csrc/cuda/contmix_launch.cu)."""
    *biases, small, large = rest
    products, sums = macs_of_contmix(value, keys, small, large)
    return Cost(1, bytes_of([value, query, keys, *biases, *outputs]), products + sums)


def cost_of_contmix_backward(
    grad_output: Tensor, value: Tensor, query: Tensor, keys: Tensor, *rest: Any, outputs: Sequence[Tensor]
) -> Cost:
    """A kernel for the gradient of the value, one for all others, and sums of its partial sums over the map.

    Both make the logits again. The second makes the weights' gradients from the windows, and from them two products.
    """
    *biases, output, logsumexp, small, large, wanted = rest
    products, sums = macs_of_contmix(value, keys, small, large)
    cost = Cost()
    if wanted[0]:
        read = [grad_output, query, keys, *biases, logsumexp]
        cost += Cost(1, bytes_of([*read, outputs[0]]), products + sums)
    if any(wanted[1:]):
        read = [grad_output, value, query, keys, *biases, output, logsumexp]
        cost += Cost(1, bytes_of([*read, outputs[1]]), 3 * products + sums)
    batch, groups = keys.shape[:2]
    partials = partials_of_contmix(*value.shape[-2:], batch * groups)
    # Partial sums are written and read. All images, and of the bias all groups, have their own.
    copies = (1, batch * groups, batch, batch)
    for total, each, copy in zip(outputs[2:], wanted[2:], copies):
        if each:
            cost += Cost(1, bytes_of([total]) * (1 + 2 * partials * copy))
    return cost


def macs_of_contmix(value: Tensor, keys: Tensor, small: int, large: int) -> tuple[int, int]:
    """Multiply-adds of the products of queries with keys, and of the sums over windows, each over half of the channels."""
    batch, channels, height, width = value.shape
    _, groups, slots, query_channels = keys.shape
    positions = batch * height * width
    return positions * groups * slots * query_channels, positions * channels // 2 * (small**2 + large**2)


def partials_of_contmix(height: int, width: int, images_and_groups: int) -> int:
    """Parts of the map that have partial sums: contmix_backward_partials of csrc/cuda/contmix_launch.cu."""
    tiles = math.ceil(width / 16) * math.ceil(height / 8)
    return math.ceil(tiles / math.ceil(tiles / max(768 // images_and_groups, 1)))


# Depth-wise convolutions.


def cost_of_depthwise(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int, residual: bool, outputs: Sequence[Tensor]
) -> Cost:
    """One kernel."""
    return Cost(1, bytes_of([x, weight, bias, *outputs]), x.numel() * weight[0].numel())


def cost_of_depthwise_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    dilation: int,
    residual: bool,
    wanted: Sequence[bool],
    outputs: Sequence[Tensor],
) -> Cost:
    """A kernel for the gradient of the map; one for partial sums of those of the parameters, and one that adds them.

    The first two are one for a kernel of 3x3 without dilation.
    """
    of_x, of_weight, of_bias = wanted
    macs = x.numel() * weight[0].numel()
    of_map = Cost(1, bytes_of([grad_output, weight, x]), macs) if of_x else Cost()
    if not of_weight:
        return of_map
    sums = bytes_of_sums(weight) + (bytes_of_sums(weight[:, 0, 0, 0]) if of_bias else 0)
    partials = partials_of_depthwise(x, weight.shape[-1], dilation)
    cost = Cost(2, bytes_of([grad_output, x]) + sums * (2 * partials + 1), macs)
    if weight.shape[-1] == 3 and dilation == 1:
        return cost + (Cost(0, bytes_of([weight, x]), macs) if of_x else Cost(0, bytes_of([weight])))
    return of_map + cost


def bytes_of_sums(parameter: Tensor) -> int:
    """Of a gradient in the accumulation type."""
    return parameter.numel() * (8 if parameter.dtype == torch.float64 else 4)


def partials_of_depthwise(x: Tensor, kernel_size: int, dilation: int) -> int:
    return torch.ops.overlock_mm._depthwise_partials(x.shape, kernel_size, dilation, x.dtype, SHARED_MEMORY)


# Layer norms.


def cost_of_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, outputs: Sequence[Tensor]) -> Cost:
    """One kernel, with statistics or without."""
    return Cost(1, bytes_of([x, *outputs]) + bytes_of_sums(weight) + bytes_of_sums(bias))


def cost_of_layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    other_grad: Optional[Tensor],
    outputs: Sequence[Tensor],
) -> Cost:
    """A kernel for the gradient of the map and partial sums of those of the parameters, and one that adds these."""
    partials = torch.ops.overlock_mm._layer_norm_partials(x.shape, x.dtype)
    of_sums = 2 * partials * 2 * bytes_of_sums(weight)
    return Cost(2, bytes_of([grad_output, x, mean, rstd, other_grad, *outputs]) + bytes_of_sums(weight) + of_sums)


# Branch norms.


class BranchSizes:
    """Bytes and numbers that the launches of branch norms have in common (csrc/cuda/branch_norms_launch.h)."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> None:
        self.kernel_sizes = [weight.shape[-1] for weight in weights]
        self.batch, self.channels, self.branches = *x.shape[:2], len(weights)
        self.parts, self.weight_parts, self.images, self.tiled = torch.ops.overlock_mm._branch_norms_parts(
            x.shape, self.kernel_sizes, dilations, x.dtype, SHARED_MEMORY
        )
        self.number = 8 if x.dtype == torch.float64 else 4  # bytes of a sum
        self.map = bytes_of([x])
        self.taps = sum(k * k for k in self.kernel_sizes)  # multiply-adds of an output, too
        self.weights = self.number * self.channels * self.taps
        self.statistic = self.number * self.channels * self.branches
        self.macs = x.numel() * self.taps


def cost_of_branch_statistics(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], outputs: Sequence[Tensor]
) -> Cost:
    """A kernel for the statistics of parts of the map, and one that merges them."""
    sizes = BranchSizes(x, weights, dilations)
    partial = sizes.parts * (2 * sizes.statistic + 8)
    return Cost(2, sizes.map + sizes.weights + 2 * partial + 2 * sizes.statistic, sizes.macs)


def cost_of_branch_norms_given(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    dilations: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    """A kernel that folds the branches into one kernel and a bias, and the convolution."""
    sizes = BranchSizes(x, weights, dilations)
    folded = sizes.number * sizes.channels * (sizes.kernel_sizes[0] ** 2 + 1)
    macs = x.numel() * sizes.kernel_sizes[0] ** 2
    return Cost(2, sizes.weights + 4 * sizes.statistic + 2 * folded + 2 * sizes.map, macs)


def cost_of_branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    _, *statistics = outputs
    given = (x, weights, norm_weights, norm_biases, *statistics, dilations, eps)
    of_statistics = cost_of_branch_statistics(x, weights, dilations, outputs)
    return of_statistics + cost_of_branch_norms_given(*given, outputs=outputs)


def cost_of_branch_norms_sums(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    mean: Tensor,
    dilations: Sequence[int],
    outputs: Sequence[Tensor],
    of_norms: bool = False,
) -> Cost:
    """A kernel for sums of parts of the map, and one that adds them; with the gradients of the norms' parameters."""
    sizes = BranchSizes(x, weights, dilations)
    sums = sizes.statistic + sizes.number * sizes.channels
    read = 2 * sizes.map + sizes.weights + sizes.statistic + 3 * sizes.statistic * of_norms  # these: variances, gradients
    return Cost(2, read + 2 * sizes.parts * sums + sums, sizes.macs)


def cost_of_branch_norms_gradients(
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
    outputs: Sequence[Tensor],
) -> Cost:
    """A kernel for the gradients of the branches' outputs, and one that makes of them those of the map, and of the weights.

    The general kernels have one for each of these. All start again for every few images of a large batch. Parts of the
    weights' gradients are added in the end.
    """
    sizes = BranchSizes(x, weights, dilations)
    starts = math.ceil(sizes.batch / sizes.images)
    branches = sizes.branches * sizes.map
    of_outputs = 2 * sizes.map + branches + starts * (sizes.weights + 4 * sizes.statistic + sizes.number * sizes.channels)
    of_inputs = 2 * sizes.map + branches + starts * sizes.weights * (1 + sizes.weight_parts)
    if not sizes.tiled:
        of_inputs += branches
    of_sums = sizes.weights * (starts * sizes.weight_parts + 1)
    launches = starts * (2 if sizes.tiled else 3) + 1
    return Cost(launches, of_outputs + of_inputs + of_sums, 3 * sizes.macs)


def cost_of_branch_norms_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    dilations: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    of_sums = cost_of_branch_norms_sums(grad_output, x, weights, mean, dilations, outputs, of_norms=True)
    given = (grad_output, x, weights, norm_weights, mean, variance, mean[0], mean, dilations, eps)
    return of_sums + cost_of_branch_norms_gradients(*given, outputs=outputs)


# Scales and shifts.


def cost_of_scale_and_shift(
    x: Tensor, scale: Tensor, shift: Optional[Tensor], other: Optional[Tensor], outputs: Sequence[Tensor]
) -> Cost:
    """One kernel."""
    parameters = sum(bytes_of_sums(each) for each in (scale, shift) if each is not None)
    return Cost(1, bytes_of([x, other, *outputs]) + parameters)


def cost_of_scale_and_shift_backward(
    grad_output: Tensor, x: Tensor, scale: Tensor, has_shift: bool, outputs: Sequence[Tensor]
) -> Cost:
    """A kernel for the gradient of the map and partial sums of those of the parameters, and one that adds these."""
    strips = torch.ops.overlock_mm._scale_and_shift_strips(x.shape)
    copies = strips * (1 if scale.ndim == 2 else x.shape[0])
    of_sums = 2 * copies * (1 + has_shift) * bytes_of_sums(scale)
    return Cost(2, bytes_of([grad_output, x, *outputs]) + bytes_of_sums(scale) + of_sums)


def cost_of_scaled_sum(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    other: Tensor,
    other_scale: Tensor,
    other_shift: Tensor,
    outputs: Sequence[Tensor],
) -> Cost:
    """One kernel."""
    return Cost(1, bytes_of([x, other, *outputs]) + 4 * bytes_of_sums(scale))


def cost_of_scaled_sum_backward(
    grad_output: Tensor, x: Tensor, scale: Tensor, other: Tensor, other_scale: Tensor, outputs: Sequence[Tensor]
) -> Cost:
    """A kernel for the gradients of the maps and partial sums of those of the parameters, and one that adds these."""
    of_sums = 3 * torch.ops.overlock_mm._scale_and_shift_strips(x.shape) * x.shape[0] * bytes_of_sums(scale)
    return Cost(2, bytes_of([grad_output, x, other, *outputs]) + 2 * bytes_of_sums(scale) + 2 * of_sums)


# Squeeze-excitation.


class GateBytes:
    """Bytes of what is not a map.

    Args:
        x: the map.
        reduce_weight: (R, C), of the first layer.
    """

    def __init__(self, x: Tensor, reduce_weight: Tensor) -> None:
        hidden, channels = reduce_weight.shape
        number = bytes_of_sums(x[0, :1, 0, 0])
        self.weights, self.biases = 2 * number * hidden * channels, number * (hidden + channels)
        self.per_image, self.squeezed = number * x.shape[0] * channels, number * x.shape[0] * hidden
        self.sums = torch.ops.overlock_mm._scale_and_shift_strips(x.shape) * self.per_image


def cost_of_squeeze_excitation(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    other: Optional[Tensor],
    outputs: Sequence[Tensor],
) -> Cost:
    """Sums over positions, means and gates of them, and the map that is scaled."""
    gates = GateBytes(x, reduce_weight)
    cost = Cost(1, bytes_of([x]) + gates.sums)
    cost += Cost(1, gates.sums + gates.weights + gates.biases + 2 * gates.per_image + gates.squeezed)
    return cost + Cost(1, bytes_of([x, x, other]) + gates.per_image)


def cost_of_gated(x: Tensor, gate: Tensor, other: Optional[Tensor], outputs: Sequence[Tensor]) -> Cost:
    """One kernel."""
    return Cost(1, bytes_of([x, gate, other, *outputs]))


def cost_of_squeeze_excitation_backward(
    grad_output: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    other: Optional[Tensor],
    gate: Tensor,
    mean: Tensor,
    squeezed: Tensor,
    outputs: Sequence[Tensor],
) -> Cost:
    """Sums of products, the gradients before both layers and of the mean, of the parameters, and of the maps."""
    gates = GateBytes(x, reduce_weight)
    cost = Cost(1, bytes_of([grad_output, x, other]) + gates.sums)
    cost += Cost(1, gates.sums + gates.weights + 3 * gates.per_image + 2 * gates.squeezed)
    cost += Cost(1, 2 * gates.per_image + 2 * gates.squeezed + gates.weights + gates.biases)
    maps = [grad_output, x] if other is None else [grad_output, x, other, x, other]
    return cost + Cost(1, bytes_of(maps) + 2 * gates.per_image)


# Response norms, and the layers before them in an MLP.


@dataclass
class NormBytes:
    """Bytes of what is not a map.

    Args:
        x: the map.
        strips: parts of an image that have sums of their own.
    """

    x: Tensor
    strips: int

    @property
    def per_channel(self) -> int:
        return bytes_of_sums(self.x[0, :, 0, 0])

    @property
    def per_image(self) -> int:
        return self.x.shape[0] * self.per_channel

    @property
    def sums(self) -> int:
        return self.strips * self.per_image

    @property
    def factors(self) -> Cost:
        """The kernel that makes response and scale of sums of squares."""
        return Cost(1, self.sums + self.per_channel + 2 * self.per_image)

    @property
    def gradients(self) -> Cost:
        """The kernel that makes scale, slope, and the gradients of gamma and beta for each image, of two sums."""
        return Cost(1, 2 * self.sums + self.per_channel + self.per_image + 4 * self.per_image)

    @property
    def scale_and_shift(self) -> Cost:
        return Cost(1, 2 * bytes_of([self.x]) + self.per_image + self.per_channel)


def cost_of_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, outputs: Sequence[Tensor]) -> Cost:
    """Sums of squares, factors, and the normalised map."""
    norm = NormBytes(x, torch.ops.overlock_mm._response_norm_strips(x.shape))
    return Cost(1, bytes_of([x]) + norm.sums) + norm.factors + norm.scale_and_shift


def cost_of_response_normed(x: Tensor, scale: Tensor, beta: Tensor, outputs: Sequence[Tensor]) -> Cost:
    """One kernel."""
    return Cost(1, bytes_of([x, scale, *outputs]) + bytes_of_sums(beta))


def cost_of_response_norm_backward(
    grad_output: Tensor, x: Tensor, gamma: Tensor, response: Tensor, eps: float, outputs: Sequence[Tensor]
) -> Cost:
    """Sums, factors, and the gradients: that of the map, and sums over images of those of the parameters."""
    norm = NormBytes(x, torch.ops.overlock_mm._response_norm_strips(x.shape))
    cost = Cost(1, bytes_of([grad_output, x]) + 2 * norm.sums) + norm.gradients
    return cost + Cost(1, bytes_of([grad_output, x, x]) + 4 * norm.per_image + 2 * norm.per_channel)


def cost_of_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    """Sums of squares, factors, and the normalised map, with a GELU before them or without."""
    norm, read, macs = residual_norm(x, bias)
    cost = Cost(1, read + norm.sums, macs) + norm.factors
    return cost + Cost(1, read + norm.per_image + norm.per_channel + bytes_of([x]), macs)


def cost_of_gelu_normed(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], scale: Tensor, beta: Tensor, outputs: Sequence[Tensor]
) -> Cost:
    """One kernel."""
    norm, read, macs = residual_norm(x, bias)
    return Cost(1, read + bytes_of([scale, *outputs]) + norm.per_channel, macs)


def cost_of_residual_norm_inplace(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    """The convolved map with sums of its squares, factors, and the normalised map."""
    norm, read, macs = residual_norm(x, bias)
    return Cost(1, read + norm.sums + bytes_of([x]), macs) + norm.factors + norm.scale_and_shift


def cost_of_gelu_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    response: Tensor,
    eps: float,
    outputs: Sequence[Tensor],
) -> Cost:
    """Sums, factors, the gradient of the map with partial sums of those of the parameters, and their sums.

    The first and the third make the convolved map again. The third also has two convolutions of a backward.
    """
    norm, read, macs = residual_norm(x, bias)
    cost = Cost(1, read + bytes_of([grad_output]) + 2 * norm.sums, macs) + norm.gradients
    cost += Cost(1, read + bytes_of([grad_output, x]) + 2 * norm.per_image + 10 * norm.sums, 3 * macs)
    return cost + Cost(1, 10 * norm.sums + 2 * norm.per_image + 12 * norm.per_channel)


def residual_norm(x: Tensor, bias: Optional[Tensor]) -> tuple[NormBytes, int, int]:
    """Bytes of sums, bytes that a kernel reads of the map and the convolution, and multiply-adds of the convolution."""
    norm = NormBytes(x, torch.ops.overlock_mm._residual_depthwise_norm_strips(x.shape))
    return norm, bytes_of([x]) + (9 + (bias is not None)) * norm.per_channel, 9 * x.numel()


#: By the names of operators: takes their arguments, and the outputs.
STATED: dict[str, Callable[..., Cost]] = {
    '_contmix_keys': cost_of_contmix_keys,
    '_contmix_keys_backward': cost_of_contmix_keys_backward,
    '_contmix': cost_of_contmix,
    '_contmix_backward': cost_of_contmix_backward,
    'depthwise_conv2d': cost_of_depthwise,
    '_depthwise_conv2d_backward': cost_of_depthwise_backward,
    'layer_norm': cost_of_layer_norm,
    'scale_and_shift': cost_of_scale_and_shift,
    '_scale_and_shift_backward': cost_of_scale_and_shift_backward,
    'scaled_sum': cost_of_scaled_sum,
    '_scaled_sum_backward': cost_of_scaled_sum_backward,
    'squeeze_excitation': cost_of_squeeze_excitation,
    '_gated': cost_of_gated,
    '_squeeze_excitation': cost_of_squeeze_excitation,
    '_squeeze_excitation_backward': cost_of_squeeze_excitation_backward,
    '_layer_norm': cost_of_layer_norm,
    '_layer_norm_backward': cost_of_layer_norm_backward,
    'branch_norms': cost_of_branch_norms,
    '_branch_norms_backward': cost_of_branch_norms_backward,
    '_branch_statistics': cost_of_branch_statistics,
    '_branch_norms_given': cost_of_branch_norms_given,
    '_branch_norms_sums': cost_of_branch_norms_sums,
    '_branch_norms_gradients': cost_of_branch_norms_gradients,
    'global_response_norm': cost_of_response_norm,
    '_response_normed': cost_of_response_normed,
    '_response_norm': cost_of_response_norm,
    '_response_norm_backward': cost_of_response_norm_backward,
    'residual_depthwise_norm': cost_of_residual_norm,
    'residual_depthwise_norm_': cost_of_residual_norm_inplace,
    'gelu_residual_depthwise_norm': cost_of_residual_norm,
    '_gelu_residual_depthwise_normed': cost_of_gelu_normed,
    '_gelu_residual_depthwise_norm': cost_of_residual_norm,
    '_gelu_residual_depthwise_norm_backward': cost_of_gelu_norm_backward,
}
