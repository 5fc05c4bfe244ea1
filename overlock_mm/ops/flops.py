"""Floating-point operations of the compiled operators, for :mod:`torch.utils.flop_counter`: two for each multiply-add.

They are registered when ``overlock_mm.ops`` is imported: a ``FlopCounterMode`` counts these operators with PyTorch's own.
As there, convolutions, products and sums over windows count. Norms and elementwise operators do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter

Shape = Sequence[int]


def contmix(
    value: Shape, query: Shape, keys: Shape, bias: Any, rpb_small: Any, rpb_large: Any, small: int, large: int, **_: Any
) -> int:
    """Products of the query with a key of every slot, and sums over both windows, each over half of the channels.

    ``keys`` is (B, G, slots, Cq/G): the folded keys (docs/contmix.md).
    """
    products, sums = _parts_of_contmix(value, keys, small, large)
    return products + sums


def contmix_of_tokens(
    value: Shape,
    query: Shape,
    key: Shape,
    proj_weight: Shape,
    proj_bias: Any,
    rpb_small: Any,
    rpb_large: Any,
    groups: int,
    small: int,
    large: int,
    scale: float = 1.0,
) -> int:
    """:func:`contmix`, and the product that folds the keys: ``key`` is (B, Cq, S, S), ``proj_weight`` (slots, S * S)."""
    keys = key[0], groups, proj_weight[0], key[1] // groups
    return contmix_keys(key, proj_weight) + contmix(value, query, keys, None, None, None, small, large)


def contmix_keys(key: Shape, proj_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * key[0] * key[1] * math.prod(proj_weight)


def contmix_keys_backward(
    grad_keys: Shape, key: Shape, proj_weight: Shape, scale: float, wanted: Sequence[bool], **_: Any
) -> int:
    return sum(wanted) * contmix_keys(key, proj_weight)


def contmix_backward(grad_output: Shape, value: Shape, query: Shape, keys: Shape, *rest: Any, **_: Any) -> int:
    """The gradient of the value makes the kernels again and sums over windows. That of the query makes the logits and the
    kernels' gradients, and two products from these.
    """
    *_, small, large, wanted = rest
    products, sums = _parts_of_contmix(value, keys, small, large)
    return wanted[0] * (products + sums) + any(wanted[1:]) * (3 * products + sums)


def _parts_of_contmix(value: Shape, keys: Shape, small: int, large: int) -> tuple[int, int]:
    batch, channels, height, width = value
    _, groups, slots, query_channels = keys
    positions = batch * height * width
    return 2 * positions * groups * slots * query_channels, 2 * positions * (channels // 2) * (small**2 + large**2)


def depthwise_conv2d(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """A multiply-add for each tap at each position."""
    return 2 * math.prod(x) * math.prod(weight[1:])


def depthwise_conv2d_backward(
    grad_output: Shape, x: Shape, weight: Shape, dilation: int, residual: bool, wanted: Sequence[bool], **_: Any
) -> int:
    return sum(wanted[:2]) * depthwise_conv2d(x, weight)


def gelu_norm_backward(grad_output: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """The convolution again, and its gradients of the map and of the kernel."""
    return 3 * depthwise_conv2d(x, weight)


def branch_norms(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Each branch's output for the statistics, and one convolution with the largest kernel."""
    return branch_statistics(x, weights) + depthwise_conv2d(x, weights[0])


def branch_statistics(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(depthwise_conv2d(x, weight) for weight in weights)


def branch_norms_given(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return depthwise_conv2d(x, weights[0])


def branch_norms_backward(grad_output: Shape, x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Each branch's output again, its gradients of the map and of the kernel."""
    return 3 * branch_statistics(x, weights)


#: By the names of operators.
FORMULAS: dict[str, Callable[..., int]] = {
    '_contmix_keys': contmix_keys,
    '_contmix_keys_backward': contmix_keys_backward,
    '_contmix': contmix,
    '_contmix_backward': contmix_backward,
    'depthwise_conv2d': depthwise_conv2d,
    '_depthwise_conv2d_backward': depthwise_conv2d_backward,
    'residual_depthwise_norm': depthwise_conv2d,
    'residual_depthwise_norm_': depthwise_conv2d,
    'gelu_residual_depthwise_norm': depthwise_conv2d,
    '_gelu_residual_depthwise_normed': depthwise_conv2d,
    '_gelu_residual_depthwise_norm': depthwise_conv2d,
    '_gelu_residual_depthwise_norm_backward': gelu_norm_backward,
    'branch_norms': branch_norms,
    '_branch_norms_backward': branch_norms_backward,
    '_branch_norms_given': branch_norms_given,
}


def register() -> None:
    """Register the formulas of the operators that the binary has. PyTorch before 2.2 has no such registry."""
    if not hasattr(flop_counter, 'register_flop_formula'):
        return
    for name, formula in FORMULAS.items():
        if hasattr(torch.ops.overlock_mm, name):
            flop_counter.register_flop_formula(getattr(torch.ops.overlock_mm, name))(_of_shapes(formula))


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """As PyTorch calls it: with shapes in the place of tensors, and that of the output as ``out_shape``."""

    def run(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return run
