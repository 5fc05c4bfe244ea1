"""All operators in plain PyTorch: the equations of the papers, with shapes.

They are what the compiled operators are tested against, what runs on devices without compiled operators, and what exports
contain. Their arguments are those of the operators and are not checked here.

B images, C channels, an H x W map. ContMix has G groups, S x S context tokens, and two branches, one for the small and one
for the large kernel. A branch has k x k *slots*, and c = C/2/G channels per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def accumulation_type(x: Tensor) -> torch.dtype:
    """The dtype that sums are made in: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether a map (B, C, H, W) is channels_last. A map that is both counts as contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# ContMix.


def window_starts(size: int, kernel_size: int, device: Optional[torch.device] = None) -> Tensor:
    """First index of each position's window along an axis of ``size``: (size,). At a border the window moves inward."""
    positions = torch.arange(size, device=device)
    # Two steps: on an axis shorter than the kernel, windows leave it at the end, where an exported graph fails. A negative
    # start would count from the end.
    return (positions - kernel_size // 2).clamp(max=size - kernel_size).clamp(min=0)


def relative_position_bias(rpb: Tensor, height: int, width: int) -> Tensor:
    """Lay out biases by offset, (G, 2k-1, 2k-1), as biases by position and window slot, (G, H, W, k, k).

    The slot that holds neighbour j of position p takes the entry j - p + k - 1 of each axis: k entries in a row, from the
    one of the window's first slot on.
    """
    kernel_size = (rpb.shape[-1] + 1) // 2
    windows = rpb.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1).contiguous()  # (G, k, k, k, k), by first entries
    for axis, size in ((1, height), (2, width)):
        positions = torch.arange(size, device=rpb.device)
        first = window_starts(size, kernel_size, rpb.device) - positions + kernel_size - 1  # (size)
        windows = windows.index_select(axis, first)
    return windows  # (G, H, W, k, k)


def aggregate(value: Tensor, kernels: Tensor) -> Tensor:
    """Sum each position's clamped window, weighted by the position's own kernel.

    The k rows of values that a line of the map sees are one matrix, k*W x c. The kernels of the line, with zeros at the
    columns outside of their windows, are another, W x k*W. So the sums are one product, and the laying out is one, with
    zeros and ones, for each column of the map. An unfolded map would take k*k times the memory of the map, and shifted sums
    would take k*k passes over it. The backward keeps k * G * H * W * W numbers an image.

    Args:
        value: (B, G, c, H, W).
        kernels: (B, G, H, W, k, k), a weight for every slot of every position.

    Returns:
        (B, G, c, H, W).
    """
    batch, groups, height, width, kernel_size = kernels.shape[:5]
    slots = torch.arange(kernel_size, device=value.device)
    rows = window_starts(height, kernel_size, value.device).unsqueeze(-1) + slots  # (H, k)
    columns = window_starts(width, kernel_size, value.device).unsqueeze(-1) + slots  # (W, k)
    column_of_slot = columns.unsqueeze(-1) == torch.arange(width, device=value.device)  # (W, k, W)

    bands = kernels.movedim(3, 0).flatten(1, 4) @ column_of_slot.to(kernels.dtype)  # (W, B*G*H*k, W)
    bands = bands.view(width, batch, groups, height, kernel_size * width).movedim(0, 3)  # (B, G, H, W, k*W)
    lines = value.permute(0, 1, 3, 4, 2).index_select(2, rows.flatten())  # (B, G, H*k, W, c)
    lines = lines.reshape(batch, groups, height, kernel_size * width, value.shape[2])  # (B, G, H, k*W, c)
    return (bands @ lines).permute(0, 1, 4, 2, 3)


def contmix_kernels(
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
) -> tuple[Tensor, Tensor]:
    """:func:`overlock_mm.ops.contmix_kernels`, with the same arguments: (B, G, H, W, ks, ks), (B, G, H, W, kl, kl).

    Logits are W_d times the scaled affinities kᵀq of a position with all context tokens (eq. 1, 2). (W_d kᵀ) q has the
    cheaper products.
    """
    batch, _, height, width = query.shape
    dtype = accumulation_type(query)
    channels = query.shape[1] // num_groups
    q = query.to(dtype).reshape(batch, num_groups, channels, height * width).transpose(-2, -1)  # (B, G, HW, Cq/G)
    k = (scale * key.to(dtype)).unflatten(1, (num_groups, channels)).flatten(-2)  # (B, G, Cq/G, S²)
    sizes = [small_kernel_size**2, large_kernel_size**2]

    def kernels(kernel_size: int, weight: Tensor, bias: Optional[Tensor], rpb: Optional[Tensor]) -> Tensor:
        z = q @ (k @ weight.to(dtype).t())  # (B, G, HW, k²)
        z = z.unflatten(2, (height, width))  # (B, G, H, W, k²)
        if bias is not None:
            z = z + bias.to(dtype)
        if rpb is not None:
            z = z + relative_position_bias(rpb.to(dtype), height, width).flatten(-2)
        return z.softmax(dim=-1).unflatten(-1, (kernel_size, kernel_size))  # (B, G, H, W, k, k): every kernel sums to 1

    weights = proj_weight.split(sizes)
    biases = (None, None) if proj_bias is None else proj_bias.split(sizes)
    return (
        kernels(small_kernel_size, weights[0], biases[0], rpb_small),
        kernels(large_kernel_size, weights[1], biases[1], rpb_large),
    )


def contmix_reference(
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
) -> Tensor:
    """:func:`overlock_mm.ops.contmix` in plain PyTorch, with the same arguments.

    It materialises all kernels, as the published code does, and supports higher-order derivatives.
    """
    batch, channels, height, width = value.shape
    kernels_of_both = contmix_kernels(
        query,
        key,
        proj_weight,
        proj_bias,
        rpb_small,
        rpb_large,
        num_groups=num_groups,
        small_kernel_size=small_kernel_size,
        large_kernel_size=large_kernel_size,
        scale=scale,
    )
    outputs = []
    for half, kernels in zip(value.chunk(2, dim=1), kernels_of_both):
        v = half.to(kernels.dtype).reshape(batch, num_groups, channels // 2 // num_groups, height, width)  # (B, G, c, H, W)
        outputs.append(aggregate(v, kernels).reshape(batch, channels // 2, height, width))  # (B, C/2, H, W) (eq. 3)
    return torch.cat(outputs, dim=1).to(value.dtype)  # (B, C, H, W)


# Depth-wise convolutions and norms.


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int, residual: bool) -> Tensor:
    """``conv(x) + bias``, and ``+ x`` if ``residual``: (B, C, H, W)."""
    padding = dilation * (weight.shape[-1] // 2)
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x, weight.to(x.dtype), bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    return x + out if residual else out


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Woo et al., ConvNeXt V2, eq. 1-3: the map, and its scale (B, C), which has no gradient."""
    # In float16 a sum of squares over a map would overflow at ordinary activations.
    response = torch.linalg.vector_norm(x, dim=(2, 3), dtype=accumulation_type(x))  # (B, C) (eq. 1)
    response = response / (response.mean(dim=1, keepdim=True) + eps)  # (eq. 2)
    scale = gamma.to(response.dtype) * response + 1
    return response_normed(x, scale, beta), scale.detach()  # (eq. 3)


def response_normed(x: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """``x * scale + beta``: scale is (B, C)."""
    return torch.addcmul(beta.view(1, -1, 1, 1).to(x.dtype), x, scale[..., None, None].to(x.dtype))


def scale_and_shift(x: Tensor, scale: Tensor, shift: Optional[Tensor], other: Optional[Tensor]) -> Tensor:
    """``x * scale + shift + other``: scale is (C), or (B, C) without a shift, and other a map."""
    out = x * scale[..., None, None].to(x.dtype)
    out = out if shift is None else out + shift[:, None, None].to(x.dtype)
    return out if other is None else out + other


def scaled_sum(x: Tensor, scale: Tensor, shift: Tensor, other: Tensor, other_scale: Tensor, other_shift: Tensor) -> Tensor:
    """``(x * scale + shift) + (other * other_scale + other_shift)``, with parameters (C)."""
    return scale_and_shift(x, scale, shift, None) + scale_and_shift(other, other_scale, other_shift, None)


def squeeze_excitation(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    other: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Hu et al., CVPR 2018, eq. 2-4, with a GELU: the map, and its gate (B, C), which has no gradient."""
    dtype = accumulation_type(x)
    mean = x.mean(dim=(2, 3), dtype=dtype)  # (B, C)
    hidden = F.gelu(F.linear(mean, reduce_weight.to(dtype), reduce_bias.to(dtype)))  # (B, R)
    gate = F.linear(hidden, expand_weight.to(dtype), expand_bias.to(dtype)).sigmoid()  # (B, C)
    return gated(x, gate, other), gate.detach()


def gated(x: Tensor, gate: Tensor, other: Optional[Tensor]) -> Tensor:
    """``x * gate * silu(other)``: gate is (B, C), and other a map, or None."""
    out = x * gate[..., None, None].to(x.dtype)
    return out if other is None else out * F.silu(other)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the channels, at every position by itself."""
    dtype = accumulation_type(x)
    rows = x.permute(0, 2, 3, 1).to(dtype)  # (B, H, W, C)
    out = F.layer_norm(rows, weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return out.permute(0, 3, 1, 2).to(x.dtype)


def residual_depthwise_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    return global_response_norm(depthwise_conv2d(x, weight, bias, 1, True), gamma, beta, eps)[0]


def residual_depthwise_norm_(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float
) -> None:
    x.copy_(residual_depthwise_norm(x, weight, bias, gamma, beta, eps))


def gelu_residual_depthwise_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The map, and the scale of its norm (B, C), which has no gradient."""
    return global_response_norm(depthwise_conv2d(F.gelu(x), weight, bias, 1, True), gamma, beta, eps)


def gelu_residual_depthwise_normed(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], scale: Tensor, beta: Tensor
) -> Tensor:
    """The map, for a scale that is known."""
    return response_normed(depthwise_conv2d(F.gelu(x), weight, bias, 1, True), scale, beta)


def lean_gelu_residual_depthwise_norm(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`gelu_residual_depthwise_norm` for training: the backward keeps ``x`` and no other map, and runs it again."""
    return _LeanGeluResidualDepthwiseNorm.apply(x, weight, bias, gamma, beta, eps)


class _LeanGeluResidualDepthwiseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.eps = arguments
        ctx.save_for_backward(*tensors)
        output, scale = gelu_residual_depthwise_norm(*arguments)
        ctx.mark_non_differentiable(scale)
        return output, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Optional[Tensor], ...]:
        leaves = [
            None if each is None else each.detach().requires_grad_(wanted)
            for each, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad)
        ]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with torch.enable_grad():
            out, _ = gelu_residual_depthwise_norm(*leaves, ctx.eps)
        gradients = iter(torch.autograd.grad(out, wanted, grad_output))
        return *(None if leaf is None or not leaf.requires_grad else next(gradients) for leaf in leaves), None


def transpose(matrices: Tensor) -> Tensor:
    """(..., m, n) to (..., n, m), contiguous."""
    return matrices.transpose(-1, -2).contiguous()


def branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each branch's convolution and batch norm by itself (OverLoCK, section 3.2). Autograd keeps every output."""
    outputs, means, variances = [], [], []
    for weight, norm_weight, norm_bias, dilation in zip(weights, norm_weights, norm_biases, dilations):
        y = depthwise_conv2d(x, weight, None, dilation, False)  # (B, C, H, W)
        out, mean, variance = _batch_norm(y, norm_weight, norm_bias, eps)
        outputs.append(out)
        means.append(mean)
        variances.append(variance)
    return sum(outputs[1:], outputs[0]), torch.stack(means), torch.stack(variances)


def lean_branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`branch_norms` for training: the backward keeps ``x`` and the first branch's output, and no other map.

    The first kernel is the largest, and its output costs most. The other outputs are computed again, one at a time.
    """
    return _LeanBranchNorms.apply(x, tuple(dilations), eps, *weights, *norm_weights, *norm_biases)


class _LeanBranchNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dilations: tuple[int, ...], eps: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        branches = len(dilations)
        weights, norm_weights, norm_biases = (parameters[i * branches : (i + 1) * branches] for i in range(3))
        out, means, variances = None, [], []
        for weight, norm_weight, norm_bias, dilation in zip(weights, norm_weights, norm_biases, dilations):
            y = depthwise_conv2d(x, weight, None, dilation, False)
            normed, mean, variance = _batch_norm(y, norm_weight, norm_bias, eps)
            if out is None:
                out, first = normed, y
            else:
                out += normed
            means.append(mean)
            variances.append(variance)
        mean, variance = torch.stack(means), torch.stack(variances)
        ctx.save_for_backward(x, first, mean, variance, *weights, *norm_weights)
        ctx.dilations, ctx.eps, ctx.bias_dtypes = dilations, eps, [bias.dtype for bias in norm_biases]
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
        x, first, means, variances, *parameters = ctx.saved_tensors
        branches = len(ctx.dilations)
        weights, norm_weights = parameters[:branches], parameters[branches:]
        inverse_deviations = torch.rsqrt(variances + ctx.eps)
        grad_x, grad_weights, grad_norm_weights, grad_norm_biases = None, [], [], []
        for i, (weight, norm_weight, dilation) in enumerate(zip(weights, norm_weights, ctx.dilations)):
            y = depthwise_conv2d(x, weight, None, dilation, False) if i else first
            scale = _dense(norm_weight, means.dtype)
            grad_y, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_batch_norm_backward(
                grad_output, y, scale, None, None, means[i], inverse_deviations[i], True, ctx.eps, [True, True, True],
            )  # fmt: skip
            grad_of_branch, grad_weight = _gradients_of_branch(grad_y, x, weight, dilation)
            grad_x = grad_of_branch if grad_x is None else grad_x + grad_of_branch
            grad_weights.append(grad_weight.to(weight.dtype))
            grad_norm_weights.append(grad_norm_weight.to(norm_weight.dtype))
            grad_norm_biases.append(grad_norm_bias.to(ctx.bias_dtypes[i]))
        return grad_x, None, None, *grad_weights, *grad_norm_weights, *grad_norm_biases


def _gradients_of_branch(grad_y: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Of a branch's input and kernel."""
    padding, kernel = dilation * (weight.shape[-1] // 2), weight.to(x.dtype)
    return torch.ops.aten.convolution_backward(
        grad_y, x, kernel, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], len(kernel), [True, True, False]
    )[:2]


def _batch_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With the statistics of the batch: the output, and the mean and the biased variance, (C) each."""
    dtype, channels, count = accumulation_type(y), y.shape[1], y.numel() // y.shape[1]
    # With a momentum of 1, running statistics are those of the batch.
    mean, variance = y.new_zeros(channels, dtype=dtype), y.new_zeros(channels, dtype=dtype)
    weight, bias = _dense(weight, dtype), _dense(bias, dtype)
    out = F.batch_norm(y, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)
    return out, mean, variance * ((count - 1) / count)


def _dense(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's gradient of a batch norm in channels_last takes a strided weight for a dense one (torch 2.11)."""
    return parameter.to(dtype).contiguous()


# Branch norms in parts, between which processes exchange what they found (sync_norms.py). The batch is that of all
# processes. y is a branch's output.


def branch_statistics(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of y in this process, (branches, C) each. Those of no values are 0."""
    if x.numel() == 0:
        mean = x.new_zeros(len(weights), x.shape[1], dtype=accumulation_type(x))
        return mean, mean.clone()
    means, variances = [], []
    for weight, dilation in zip(weights, dilations):
        y = depthwise_conv2d(x, weight, None, dilation, False).to(accumulation_type(x))
        variance, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        means.append(mean)
        variances.append(variance)
    return torch.stack(means), torch.stack(variances)


def branch_norms_given(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    dilations: Sequence[int],
    eps: float,
) -> Tensor:
    """With given statistics the branches are one kernel: (B, C, H, W)."""
    statistics = norm_weights, norm_biases, mean.unbind(), variance.unbind()
    weight, bias = fold_kernels(weights, dilations, *statistics, [eps] * len(weights))
    dtype = weights[0].dtype
    return depthwise_conv2d(x, weight.to(dtype), bias.to(dtype), 1, False)


def fold_kernels(
    kernels: Sequence[Tensor],
    dilations: Sequence[int],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Weight (C, 1, K, K) and bias (C) of the sum of branches, the first of which has the large kernel, unrounded.

    A batch norm after a convolution scales its kernel by weight / sqrt(variance + eps) and shifts its output. A kernel with
    dilation d is a sparse kernel without dilation whose taps are d apart. It lies in the middle of the large one.
    """
    exact, large = exact_dtype(kernels[0]), kernels[0].shape[-1]
    weight, bias = torch.zeros_like(kernels[0], dtype=exact), 0.0
    for kernel, dilation, *statistics, own_eps in zip(kernels, dilations, norm_weights, norm_biases, means, variances, eps):
        gamma, beta, mean, variance = (each.to(exact) for each in statistics)
        scale = gamma * torch.rsqrt(variance + own_eps)
        margin = large // 2 - dilation * (kernel.shape[-1] // 2)
        taps = slice(margin, large - margin, dilation)
        weight[:, :, taps, taps] += kernel.to(exact) * scale.view(-1, 1, 1, 1)
        bias = bias + beta - mean * scale
    return weight, bias


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to fold in: float64, but on devices that have none."""
    return torch.float32 if tensor.device.type == 'mps' else torch.float64


def branch_norms_sums(
    grad_output: Tensor, x: Tensor, weights: Sequence[Tensor], mean: Tensor, dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums over this process: of ``grad_output``, (C), and of ``grad_output * (y - mean)``, (branches, C)."""
    grad = grad_output.to(accumulation_type(x))
    products = []
    for weight, branch_mean, dilation in zip(weights, mean, dilations):
        distance = depthwise_conv2d(x, weight, None, dilation, False) - branch_mean.view(-1, 1, 1)
        products.append((grad * distance).sum(dim=(0, 2, 3)))
    return grad.sum(dim=(0, 2, 3)), torch.stack(products)


def branch_norms_gradients(
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
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the kernels, one after the other, from those sums over the batch, as means."""
    grad = grad_output - grad_mean.view(-1, 1, 1)
    inverse_deviation = torch.rsqrt(variance + eps)
    slope = product_mean * inverse_deviation.square()
    grad_x, grad_weights = None, []
    for i, (weight, norm_weight, dilation) in enumerate(zip(weights, norm_weights, dilations)):
        distance = depthwise_conv2d(x, weight, None, dilation, False) - mean[i].view(-1, 1, 1)
        scale = norm_weight.to(mean.dtype) * inverse_deviation[i]
        grad_y = scale.view(-1, 1, 1) * (grad - slope[i].view(-1, 1, 1) * distance)
        grad_of_branch, grad_weight = _gradients_of_branch(grad_y.to(x.dtype), x, weight, dilation)
        grad_x = grad_of_branch if grad_x is None else grad_x + grad_of_branch
        grad_weights.append(grad_weight.flatten().to(mean.dtype))
    return grad_x, torch.cat(grad_weights)
