"""Dense convolutions. On the CPU, where maps are small and weights large, they are oneDNN's products of matrices.

PyTorch's convolution on the CPU brings the weight, and its gradient, from one layout into another. On few positions that
takes longer than the arithmetic. It leaves float32 products to MKL or OpenBLAS, which are not equally fast on all
processors. The products here are oneDNN's (docs/notes/products.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._autocast import dtype_under_autocast
from ._library import operator, using_references
from ._modes import is_compiling, is_exporting, unseen_by_modes
from ._reference import is_channels_last

#: From this many numbers in a weight for one position of the output on, the product is faster.
WEIGHTS_PER_POSITION = 128


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d`, by the fastest way there is. It keeps the same for the backward.

    Args:
        x (Tensor[B, C, H, W])
        weight (Tensor[C_out, C / groups, k, k])
        bias (Tensor[C_out] | None)
        stride, padding, dilation, groups: as of PyTorch's.

    Returns:
        Tensor[B, C_out, H', W']
    """
    if not is_compiling() and not is_exporting() and not using_references():
        with unseen_by_modes():
            fits = _fits(x, weight, bias, stride, padding, dilation, groups)
            is_linear = fits and x.shape[2:] == weight.shape[2:] == (1, 1)
            is_product = fits and not is_linear and is_faster_as_product(x, weight, bias, stride)
        if is_linear:
            return F.linear(x.flatten(1), weight.flatten(1), bias)[..., None, None]
        if is_product:
            return _Convolution.apply(x, weight, bias, stride)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _fits(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether it is a plain convolution with a padding of k // 2, and its arguments fit together.

    PyTorch takes some settings in other forms, such as an int for two, and refuses wrong ones.
    """
    if not (type(x) is Tensor and type(weight) in _PLAIN and dilation == (1, 1) and groups == 1):
        return False
    if not (x.ndim == weight.ndim == 4 and weight.shape[1] == x.shape[1] and padding == _padding(weight)):
        return False
    if not (type(stride) is tuple and len(stride) == 2 and all(type(step) is int and step > 0 for step in stride)):
        return False
    return bias is None or (isinstance(bias, Tensor) and bias.shape == weight.shape[:1])


def is_faster_as_product(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: tuple[int, int]) -> bool:
    """Whether a plain convolution with a padding of k // 2 is faster as a product of matrices.

    All tensors must be float32 on the CPU and the weight large for the map. No transform and no dispatch mode may be
    active, because it may count or replace PyTorch's operators.
    """
    if not _is_float32_on_cpu(x, weight, bias) or _is_observed():
        return False
    if weight.shape[2:] != (1, 1) and not weight.is_contiguous():
        return False  # it and its gradient would have to be laid out anew
    positions = x.shape[0] * _extent(x, weight, stride, 0) * _extent(x, weight, stride, 1)
    if positions <= 0 or weight.numel() < WEIGHTS_PER_POSITION * positions:
        return False
    # A product may be asked to round its factors. A convolution is not meant.
    exact = torch.get_float32_matmul_precision() == 'highest'
    return exact and dtype_under_autocast(x) == torch.float32 and torch.backends.mkldnn.enabled and has_products()


@cache
def has_products() -> bool:
    """Whether this PyTorch has oneDNN, and the operator for its products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: tuple[int, int]) -> Tensor:
        of_x, of_weight = context.needs_input_grad[:2]
        context.save_for_backward(x if of_weight else None, weight if of_x else None)
        with unseen_by_modes():
            context.window = _Window(x, weight, stride)
            return context.window.map_of(_product(context.window.rows(x), weight.flatten(1), bias))

    @staticmethod
    def backward(context: Any, grad_output: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = context.saved_tensors
        window = context.window
        of_x, of_weight, of_bias, _ = context.needs_input_grad
        grad_x = grad_weight = None
        if torch.is_grad_enabled():  # to be differentiated itself
            settings = window.stride, window.padding
            if of_x:
                grad_x = torch.nn.grad.conv2d_input(window.of_input, weight, grad_output, *settings)
            if of_weight:
                grad_weight = torch.nn.grad.conv2d_weight(x, window.of_weight, grad_output, *settings)
            return grad_x, grad_weight, grad_output.sum((0, 2, 3)) if of_bias else None, None

        grad = grad_output.permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # (B * H' * W', C_out)
        if of_x:
            grad_x = window.add_up(_product(grad, weight.flatten(1).t()))
        if of_weight:
            grad_weight = _product(_transposed(grad), window.rows(x).t()).view(window.of_weight)
        return grad_x, grad_weight, grad.sum(0) if of_bias else None, None


class _Window:
    """What a convolution sees of a map at each position of its output, and the shapes that go with it."""

    def __init__(self, x: Tensor, weight: Tensor, stride: tuple[int, int]) -> None:
        self.of_input, self.of_weight = x.shape, weight.shape
        self.kernel_size, self.padding, self.stride = weight.shape[2:], _padding(weight), stride
        self.size = _extent(x, weight, stride, 0), _extent(x, weight, stride, 1)
        self.channels_last = is_channels_last(x)
        self.is_position = self.kernel_size == stride == (1, 1)

    def rows(self, x: Tensor) -> Tensor:
        """(B * H' * W', C * k * k)."""
        if self.is_position:
            return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        return _transposed(columns).flatten(0, 1)

    def add_up(self, rows: Tensor) -> Tensor:
        """The gradient of :meth:`rows`: (B, C, H, W), in the layout of the input."""
        batch, channels, height, width = self.of_input
        if self.is_position:
            return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
        columns = _transposed(rows.unflatten(0, (batch, -1)))
        out = F.fold(columns, (height, width), self.kernel_size, padding=self.padding, stride=self.stride)
        return out.contiguous(memory_format=torch.channels_last) if self.channels_last else out

    def map_of(self, outputs: Tensor) -> Tensor:
        """(B * H' * W', C_out) to (B, C_out, H', W')."""
        return outputs.view(self.of_input[0], *self.size, -1).permute(0, 3, 1, 2)


def _product(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``a @ b.t() + bias``, of dense matrices or transposed ones."""
    bias = None if bias is None else bias.contiguous()  # oneDNN takes any for a dense one
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, 'none', [], '')


def _transposed(matrices: Tensor) -> Tensor:
    """(..., m, n) to (..., n, m), dense. (PyTorch's copy takes ten times as long.)"""
    return operator('transpose')(matrices)


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


def _extent(x: Tensor, weight: Tensor, stride: tuple[int, int], axis: int) -> int:
    """Height (axis 0) or width of the output."""
    k = weight.shape[2 + axis]
    return (x.shape[2 + axis] + 2 * (k // 2) - k) // stride[axis] + 1


def _is_float32_on_cpu(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == 'cpu'
        and (bias is None or (bias.dtype == torch.float32 and bias.device.type == 'cpu' and type(bias) in _PLAIN))
    )


_PLAIN = (Tensor, torch.nn.Parameter)
# Both are internal to PyTorch. Without them, there is taken to be no mode and no transform.
_number_of_modes = getattr(torch._C, '_len_torch_dispatch_stack', lambda: 0)
_is_transforming = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)


def _is_observed() -> bool:
    return _number_of_modes() > 0 or _is_transforming() or forward_ad._current_level >= 0
