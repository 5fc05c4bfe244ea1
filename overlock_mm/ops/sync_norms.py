"""Batch norms with the statistics of several processes.

A norm exchanges twice in a training step: statistics in the forward, and sums of gradients in the backward. Both stay on
the device, and the host waits for nothing. A process may have another number of values than the others, or none.

The output is a function of its input and of statistics that were exchanged before. Only its derivative knows that they
depend on the input. So the output can be made again without another exchange, from the same statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._autocast import cast_as_autocast
from ._checks import check_dilations, check_number, check_sync_branch_norms, check_tensor, check_tensors
from ._library import operator
from ._reference import accumulation_type


class Statistics(NamedTuple):
    """Of the batch of all processes: mean and biased variance, and the number of values of a channel, (1)."""

    mean: Tensor
    variance: Tensor
    count: Tensor


def gather_statistics(mean: Tensor, variance: Tensor, count: int, process_group: Any) -> Statistics:
    """Merge the statistics of all processes, each with its own count (Chan et al., 1979), in one exchange.

    Args:
        mean, variance: of this process, of any shape. Those of no values are finite numbers.
        count: values of each channel in this process.
    """
    size = mean.numel()
    own = torch.cat([mean.flatten(), variance.flatten(), mean.new_full((1,), count)])
    means, variances, counts = _gather(own, process_group).split([size, size, 1], dim=1)  # (processes, ...)
    total = counts.sum(dim=0)
    shares = counts / total
    merged = (shares * means).sum(dim=0)
    distances = means - merged
    variance = (shares * torch.addcmul(variances, distances, distances)).sum(dim=0)
    return Statistics(merged.view_as(mean), variance.view_as(mean), total)


def _gather(own: Tensor, process_group: Any) -> Tensor:
    """(n) of each process: (processes, n)."""
    processes = dist.get_world_size(process_group)
    gathered = own.new_empty(processes * own.numel())
    dist.all_gather_into_tensor(gathered, own, group=process_group)
    return gathered.view(processes, -1)


def _sum_over_processes(sums: Tensor, process_group: Any) -> Tensor:
    """In place."""
    dist.all_reduce(sums, group=process_group)
    return sums


# ------------------------------------------------------------------------------------------------------------ one norm


def sync_batch_norm(
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    momentum: Union[float, Tensor],
    eps: float,
    process_group: Any = None,
) -> Tensor:
    """``F.batch_norm`` in training, with the statistics of the batch of all processes of a group.

    Gradients of parameters are the share of this process, as those of torch's SyncBatchNorm.

    Args:
        x (Tensor[B, C, ...]): C is the same in all processes.
        running_mean, running_var (Tensor[C] | None): updated in place, by the unbiased variance.
        weight, bias (Tensor[C] | None)
        momentum: of the running statistics, a number, or a tensor of one number.
        eps: added to the variance.
        process_group: of torch.distributed. None: all processes.

    Returns:
        Tensor[B, C, ...]: with the dtype of ``x``, contiguous or channels_last.
    """
    x = x.contiguous(memory_format=_memory_format_of(x))
    with torch.no_grad():
        # All processes must decide alike, because their messages differ. Some may have no values.
        gather = _gather_with_aten if x.is_cuda and _aten_can_update(running_mean, momentum, x) else _gather_plainly
        mean, inverse_deviation, counts = gather(x, running_mean, running_var, momentum, eps, process_group)
    return normalise_batch(x, weight, bias, mean, inverse_deviation, counts, process_group)


def _memory_format_of(x: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    has_it = channels_last is not None and x.is_contiguous(memory_format=channels_last)
    return channels_last if has_it else torch.contiguous_format


def _gather_plainly(
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: Union[float, Tensor],
    eps: float,
    process_group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and inverse deviation of the batch, (C), and counts that sum up to its values. Updates running statistics."""
    dtype, channels = accumulation_type(x), x.shape[1]
    if x.numel():
        variance, mean = torch.var_mean(x.to(dtype), dim=_all_but_channels(x), correction=0)
    else:
        mean, variance = x.new_zeros(2, channels, dtype=dtype)
    mean, variance, count = gather_statistics(mean, variance, x.numel() // channels, process_group)
    if running_mean is not None:
        for running, new in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
            running.lerp_(new.to(running.dtype), momentum)
    return mean, torch.rsqrt(variance + eps), count


def _aten_can_update(running_mean: Optional[Tensor], momentum: Union[float, Tensor], x: Tensor) -> bool:
    return not isinstance(momentum, Tensor) and (running_mean is None or running_mean.dtype == accumulation_type(x))


def _gather_with_aten(
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: float,
    eps: float,
    process_group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_gather_plainly` in three kernels beside the exchange."""
    channels = x.shape[1]
    if x.numel():
        mean, inverse_deviation = torch.batch_norm_stats(x, eps)
        count = x.numel() // channels
    else:
        mean = x.new_zeros(channels, dtype=accumulation_type(x))
        inverse_deviation = torch.ones_like(mean)
        count = 1e-30  # ATen divides by the first count. Beside a value this one counts for nothing
    own = torch.cat([mean, inverse_deviation, mean.new_full((1,), count)])
    means, inverse_deviations, counts = _gather(own, process_group).split([channels, channels, 1], dim=1)
    counts = counts.flatten()
    mean, inverse_deviation = torch.batch_norm_gather_stats_with_counts(
        means, means, inverse_deviations, running_mean, running_var, momentum, eps, counts
    )
    return mean, inverse_deviation, counts


def normalise_batch(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mean: Tensor,
    inverse_deviation: Tensor,
    counts: Tensor,
    process_group: Any,
) -> Tensor:
    """``(x - mean) * inverse_deviation * weight + bias``, differentiated as a batch norm, with one exchange.

    The statistics are those of the batch of all processes. ``counts`` sum up to its values of a channel.
    """
    if has_torch_function_variadic(x):  # modes see it as one function
        arguments = (x, weight, bias, mean, inverse_deviation, counts, process_group)
        return handle_torch_function(normalise_batch, (x,), *arguments)
    return _NormaliseBatch.apply(x, weight, bias, mean, inverse_deviation, counts, process_group)


class _NormaliseBatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        mean: Tensor,
        inverse_deviation: Tensor,
        counts: Tensor,
        process_group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_deviation, counts)
        ctx.process_group = process_group
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.is_cuda and x.numel():
            return torch.batch_norm_elemt(x, weight, bias, mean, inverse_deviation, 0.0)  # it does not read eps
        scale = inverse_deviation if weight is None else inverse_deviation * weight
        out = (x - _of_channels(mean, x)) * _of_channels(scale, x)
        out = out if bias is None else out + _of_channels(bias, x)
        # torch.compile takes a to() that changes nothing for an output without a gradient (torch 2.11).
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight, mean, inverse_deviation, counts = ctx.saved_tensors
        grad = grad_output.contiguous(memory_format=_memory_format_of(x))
        kernels = _aten_gradients if x.is_cuda and x.numel() else _plain_gradients
        needed = ctx.needs_input_grad[:3]
        gradients = kernels(grad, x, weight, mean, inverse_deviation, counts, ctx.process_group, needed)
        dtypes = (x.dtype, None if weight is None else weight.dtype, ctx.bias_dtype)
        return (
            *(each.to(dtype) if wanted else None for each, dtype, wanted in zip(gradients, dtypes, needed)),
            *(None,) * 4,
        )


def _plain_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    mean: Tensor,
    inverse_deviation: Tensor,
    counts: Tensor,
    process_group: Any,
    needed: tuple[bool, bool, bool],
) -> tuple[Optional[Tensor], ...]:
    """Of x, weight and bias."""
    distance = x - _of_channels(mean, x)
    grad_sum, product = (each.sum(dim=_all_but_channels(x), dtype=mean.dtype) for each in (grad, grad * distance))
    grad_x = None
    if needed[0]:
        sums = _sum_over_processes(torch.stack([grad_sum, product]), process_group)
        grad_mean, product_mean = sums / counts.sum()
        scale = inverse_deviation if weight is None else inverse_deviation * weight
        slope = product_mean * inverse_deviation.square()
        centred = grad - _of_channels(grad_mean, x) - _of_channels(slope, x) * distance
        grad_x = _of_channels(scale, x) * centred
    return grad_x, product * inverse_deviation, grad_sum


def _aten_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    mean: Tensor,
    inverse_deviation: Tensor,
    counts: Tensor,
    process_group: Any,
    needed: tuple[bool, bool, bool],
) -> tuple[Optional[Tensor], ...]:
    """:func:`_plain_gradients` in two passes over the maps."""
    grad_sum, product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
        grad, x, mean, inverse_deviation, weight, *needed
    )
    grad_x = None
    if needed[0]:
        sums = _sum_over_processes(torch.stack([grad_sum, product]), process_group)
        weight = None if weight is None else weight.to(mean.dtype)
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_deviation, weight, sums[0], sums[1], counts.to(torch.int32)
        )
    return grad_x, grad_weight, grad_bias


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    """(C), to be broadcast over ``x``."""
    return values.view(-1, *(1,) * (x.ndim - 2))


# ------------------------------------------------------------------------------------------------------- branch norms


def sync_branch_norms(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    dilations: Sequence[int],
    eps: float = 1e-5,
    process_group: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`branch_norms` with the statistics of the batch of all processes of a group.

    All branches exchange together, once in the forward and once in the backward. Maps may have other sizes in other
    processes. Gradients of parameters are the share of this process, as those of torch's SyncBatchNorm.

    Args:
        x, weights, norm_weights, norm_biases, dilations, eps: as in :func:`branch_norms`.
        process_group: of torch.distributed. None: all processes.

    Returns:
        tuple[Tensor[B, C, H, W], Tensor[branches, C], Tensor[branches, C], Tensor[1]]: the sum; of each branch's output the
        mean and the biased variance over the batch; the number of values of a channel in the batch. All but the sum have no
        gradient.

    Raises:
        TypeError, ValueError: as :func:`branch_norms`, but ``x`` may have one value for each channel, or none.
    """
    check_tensor('x', x)
    weights = check_tensors('weights', weights)
    norm_weights = check_tensors('norm_weights', norm_weights)
    norm_biases = check_tensors('norm_biases', norm_biases)
    dilations = check_dilations(dilations)
    check_number('eps', eps)
    x = cast_as_autocast(x)
    # Before the exchange: the other processes would wait for one that has raised an error in it.
    check_sync_branch_norms(x, weights, norm_weights, norm_biases, dilations)
    with torch.no_grad():
        mean, variance = operator('_branch_statistics')(x, weights, dilations)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        statistics = gather_statistics(mean, variance, count, process_group)
    parameters = (*weights, *norm_weights, *norm_biases)
    out = _SyncBranchNorms.apply(x, tuple(dilations), eps, process_group, *statistics, *parameters)
    return (out, *statistics)


class _SyncBranchNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dilations: tuple[int, ...],
        eps: float,
        process_group: Any,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        weights, norm_weights, norm_biases = _in_three(parameters)
        ctx.save_for_backward(x, mean, variance, count, *weights, *norm_weights)
        ctx.dilations, ctx.eps, ctx.process_group = dilations, eps, process_group
        ctx.bias_dtypes = [bias.dtype for bias in norm_biases]
        return operator('_branch_norms_given')(x, weights, norm_weights, norm_biases, mean, variance, dilations, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Optional[Tensor], ...]:
        x, mean, variance, count, *parameters = ctx.saved_tensors
        branches = len(ctx.dilations)
        weights, norm_weights = parameters[:branches], parameters[branches:]
        grad_sum, products = operator('_branch_norms_sums')(grad_output, x, weights, mean, ctx.dilations)
        grad_norm_weights = (products * torch.rsqrt(variance + ctx.eps)).unbind()
        grad_norm_weights = [grad.to(weight.dtype) for grad, weight in zip(grad_norm_weights, norm_weights)]
        grad_norm_biases = [grad_sum.to(dtype) for dtype in ctx.bias_dtypes]
        needs_x, *needs_parameters = ctx.needs_input_grad[:1] + ctx.needs_input_grad[7:]
        grad_x, grad_weights = None, [None] * branches
        if needs_x or any(needs_parameters[:branches]):
            sums = _sum_over_processes(torch.cat([grad_sum.unsqueeze(0), products]), ctx.process_group)
            means = sums / count
            grad_x, one_after_the_other = operator('_branch_norms_gradients')(
                grad_output, x, weights, norm_weights, mean, variance, means[0], means[1:], ctx.dilations, ctx.eps
            )
            sizes = [weight.numel() for weight in weights]
            grad_weights = [
                grad.view(weight.shape).to(weight.dtype) for grad, weight in zip(one_after_the_other.split(sizes), weights)
            ]
        return grad_x, *(None,) * 6, *grad_weights, *grad_norm_weights, *grad_norm_biases


def _in_three(parameters: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    branches = len(parameters) // 3
    return [parameters[i * branches : (i + 1) * branches] for i in range(3)]
