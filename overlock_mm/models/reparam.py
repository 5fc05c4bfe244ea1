"""The dilated re-parameterised depth-wise convolution, and its exact folding into one large kernel."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Union

import torch
import torch.nn as nn
from mmengine.logging import print_log
from torch import Tensor

from ..ops import branch_norms, branch_norms_given, sync_branch_norms
from ..ops._reference import accumulation_type, fold_kernels
from .layers import DepthwiseConv, is_as_built
from .norms import BatchNorm2d, SyncBatchNorm, exchanging_group, update_running_statistics

#: Norms whose tensors may be read in place of calling them.
_NORMS = (nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)

#: (kernel size, dilation) of the branches that run beside a large kernel of size K.
DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparamConv(nn.Module):
    """A large depth-wise convolution with parallel dilated ones, each with its batch norm, summed.

    At evaluation the sum is one linear map, so the branches fold exactly into a single K x K depth-wise convolution with a
    bias. That is the form of the released ``*_reparam`` checkpoints (paper section 3.2, "Dilated RepConv Layer"; the idea
    is from UniRepLKNet).

    Args:
        channels: C of the input and the output (B, C, H, W); the map keeps its size.
        kernel_size: K, one of 5, 7, ..., 17.
        deploy: build the folded form. It loads folded and unfolded weights. Unfolded ones are folded on loading.

    Raises:
        ValueError: there are no branches defined for ``kernel_size``.
    """

    def __init__(self, channels: int, kernel_size: int, deploy: bool = False) -> None:
        super().__init__()
        if kernel_size not in DILATED_BRANCHES:
            raise ValueError(f'kernel_size must be one of {sorted(DILATED_BRANCHES)}, got {kernel_size!r}')
        self.channels = channels
        self.kernel_size = kernel_size
        self.deploy = deploy
        self.lk_origin = DepthwiseConv(channels, kernel_size, bias=deploy)
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(channels)
            for k, dilation in DILATED_BRANCHES[kernel_size]:
                self.add_module(f'dil_conv_k{k}_{dilation}', DepthwiseConv(channels, k, dilation, bias=False))
                self.add_module(f'dil_bn_k{k}_{dilation}', nn.BatchNorm2d(channels))

    def branches(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolution and norm of each branch, the large one first."""
        names = [f'k{k}_{dilation}' for k, dilation in DILATED_BRANCHES[self.kernel_size]]
        dilated = [(getattr(self, f'dil_conv_{name}'), getattr(self, f'dil_bn_{name}')) for name in names]
        return [(self.lk_origin, self.origin_bn), *dilated]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return self.lk_origin(x) if self.deploy else sum_of_branches(x, self.branches())

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 1, K, K) and bias (C) of the branches with their running statistics, in float64 where there is one."""
        return _one_kernel(self.branches())

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold the branches into ``lk_origin``, with the running statistics of the batch norms, for good."""
        if self.deploy:
            return
        weight, bias = self.folded()
        folded = DepthwiseConv(self.channels, self.kernel_size).to(self.lk_origin.weight)
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        folded.requires_grad_(self.lk_origin.weight.requires_grad)
        folded.train(self.training)
        for name in list(self._modules):
            delattr(self, name)
        self.lk_origin = folded
        self.deploy = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        folded_file = f'{prefix}lk_origin.bias' in state_dict
        unfolded_file = f'{prefix}origin_bn.weight' in state_dict
        if self.deploy and unfolded_file and not folded_file:
            print_log(f'{prefix.rstrip(".")}: folded its dilated branches on loading', 'current', logging.DEBUG)
            weight, bias = fold_branches(state_dict, prefix, self.kernel_size)
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]
            state_dict[f'{prefix}lk_origin.weight'] = weight
            state_dict[f'{prefix}lk_origin.bias'] = bias
        elif not self.deploy and folded_file and not unfolded_file:
            raise ValueError(
                f'the checkpoint is folded (re-parameterised), as its {prefix}lk_origin.bias shows, and the model is not: '
                'build the model with deploy=True, or load the unfolded checkpoint'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'channels={self.channels}, kernel_size={self.kernel_size}, deploy={self.deploy}'


def sum_of_branches(x: Tensor, branches: Sequence[tuple[nn.Module, nn.Module]]) -> Tensor:
    """``sum(norm(conv(x)) for conv, norm in branches)``.

    Branches that are as they were built run as one operator. One that was replaced, wrapped or given a hook must be
    called, and then all are.

    Args:
        x: (B, C, H, W).
        branches: convolution and norm of each branch.
    """
    if all(
        is_as_built(conv, (DepthwiseConv,), 'weight') and is_as_built(norm, _NORMS, 'weight', 'bias')
        for conv, norm in branches
    ):
        norms = [norm for _, norm in branches]
        by_batch = {norm.training or norm.running_mean is None for norm in norms}
        groups = {exchanging_group(norm) for norm in norms}
        have_one_eps = len({norm.eps for norm in norms}) == 1
        if by_batch == {True} and have_one_eps and len(groups) == 1:
            return _normalised_by_batch(x, branches, groups.pop())
        if by_batch == {False} and have_one_eps:
            return _normalised_by_running_statistics(x, branches)
    (conv, norm), *others = branches
    out = norm(conv(x))
    for conv, norm in others:
        out = out + norm(conv(x))
    return out


def _normalised_by_batch(x: Tensor, branches: Sequence[tuple[nn.Module, nn.Module]], process_group: Any) -> Tensor:
    """All branches and their norms as one operator, with the statistics of the batch, of a process group or of ``x``."""
    convs, norms = zip(*branches)
    arguments = (
        x,
        [conv.weight for conv in convs],
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [conv.dilation[0] for conv in convs],
        norms[0].eps,
    )
    if process_group is not None:
        out, means, variances, count = sync_branch_norms(*arguments, process_group)
    else:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError(f'batch norms need more than one value per channel in training, got shape {tuple(x.shape)}')
        out, means, variances = branch_norms(*arguments)
    update_running_statistics(norms, means, variances, count)
    return out


def _normalised_by_running_statistics(x: Tensor, branches: Sequence[tuple[nn.Module, nn.Module]]) -> Tensor:
    """With given statistics the branches are one kernel."""
    convs, norms = zip(*branches)
    dtype = accumulation_type(norms[0].running_mean)
    return branch_norms_given(
        x,
        [conv.weight for conv in convs],
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        torch.stack([norm.running_mean for norm in norms]).to(dtype),
        torch.stack([norm.running_var for norm in norms]).to(dtype),
        [conv.dilation[0] for conv in convs],
        norms[0].eps,
    )


def fold_branches(state_dict: dict[str, Tensor], prefix: str, kernel_size: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Fold the weights of an unfolded ``DilatedReparamConv``: weight (C, 1, K, K) and bias (C) of one convolution.

    The sum is in float64 and rounded once, to the dtype of the weights.

    Args:
        state_dict: holds the unfolded weights under ``prefix``.
        prefix: of the convolution's names, '' or ending in a dot.
        kernel_size: K of the large kernel.
        eps: of the batch norms.
    """
    names = [('lk_origin', 'origin_bn', 1)]
    names += [(f'dil_conv_k{k}_{d}', f'dil_bn_k{k}_{d}', d) for k, d in DILATED_BRANCHES[kernel_size]]
    statistics = ('weight', 'bias', 'running_mean', 'running_var')
    branches = [
        _Branch(
            state_dict[f'{prefix}{conv}.weight'], d, *(state_dict[f'{prefix}{norm}.{name}'] for name in statistics), eps
        )
        for conv, norm, d in names
    ]
    weight, bias = fold_kernels(*zip(*branches))
    return weight.to(branches[0].kernel.dtype), bias.to(branches[0].kernel.dtype)


def _one_kernel(branches: Sequence[tuple[nn.Module, nn.Module]]) -> tuple[Tensor, Tensor]:
    """Weight (C, 1, K, K) and bias (C) of the sum of branches with their running statistics, unrounded."""
    return fold_kernels(*zip(*(_Branch.of(conv, norm) for conv, norm in branches)))


class _Branch(NamedTuple):
    """A depth-wise kernel (C, 1, k, k) and the batch norm behind it."""

    kernel: Tensor
    dilation: int
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: Union[nn.BatchNorm2d, nn.Identity]) -> _Branch:
        if isinstance(norm, nn.Identity):  # fuse_conv_bn of mmcv has put the norm into the convolution
            zero, one = torch.zeros_like(conv.bias), torch.ones_like(conv.bias)
            return cls(conv.weight, conv.dilation[0], gamma=one, beta=conv.bias, mean=zero, var=one, eps=0.0)
        return cls(conv.weight, conv.dilation[0], norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
