"""Matrix products by oneDNN, in training too.

PyTorch leaves a float32 product on the CPU to MKL or OpenBLAS, and only convolutions to oneDNN. On processors for which MKL
has no kernels of its own, oneDNN's products are two to three times as fast (docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autocast import dtype_under_autocast
from ._extension import is_compiling, is_exporting


def has_linear(x: Tensor) -> bool:
    """Whether :func:`linear` takes ``x``: float32, also under autocast, on the CPU, and not in a graph or an export."""
    # A graph is asked for first: torch.compile cannot look into what comes after.
    if is_compiling() or is_exporting() or type(x) is not Tensor or x.device.type != 'cpu':
        return False
    return dtype_under_autocast(x) == torch.float32 and torch.backends.mkldnn.enabled and _has_operator()


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``torch.nn.functional.linear``, which can be differentiated once.

    Args:
        x (Tensor[N, C]): see :func:`has_linear`.
        weight (Tensor[C_out, C])
        bias (Tensor[C_out] | None)

    Returns:
        Tensor[N, C_out]
    """
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        context.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad_output: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = context.saved_tensors
        of_x, of_weight, of_bias = context.needs_input_grad
        return (
            _product(grad_output, weight.t()) if of_x else None,
            _product(grad_output.t(), x.t()) if of_weight else None,
            grad_output.sum(0) if of_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``a @ b.t() + bias``, of matrices however they lie."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, 'none', [], '')


@cache
def _has_operator() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def _count_for_flop_counters() -> None:
    """Let ``torch.utils.flop_counter`` know what the operator does: it would pass over it."""
    try:
        from torch.utils.flop_counter import flop_registry, register_flop_formula
    except ImportError:  # torch 2.1 has another way
        return
    if _has_operator() and torch.ops.mkldnn._linear_pointwise not in flop_registry:

        @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
        def _(a: tuple, b: tuple, *_: Any, **__: Any) -> int:
            return 2 * prod(a) * b[0]


_count_for_flop_counters()
