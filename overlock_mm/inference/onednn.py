"""Convolutions whose weights lie as oneDNN wants them, for inference on the CPU.

PyTorch's convolution brings its weights into that layout at every call: on the small maps of a classifier's last stage it
takes longer than the convolution. These bring them there once, and take along the activation, or the sum, that follows.
"""

from __future__ import annotations

from functools import cache
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._autocast import dtype_under_autocast
from ..ops._modes import is_compiling, is_exporting

#: Whether this processor computes in bfloat16. oneDNN takes bfloat16 from AVX-512 on, and is up to 50 times slower without.
#: (torch < 2.6 does not tell.)
HAS_FAST_BFLOAT16: bool = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()
#: What can follow a convolution, and how oneDNN's operators call it: name and algorithm.
_ACTIVATIONS = {None: ('none', ''), 'gelu': ('gelu', 'none'), 'silu': ('swish', '')}


def can_pack(x: Tensor) -> bool:
    """Whether a :class:`PackedConv2d` is to take ``x``, as autocast casts it.

    It is to be float32 or, where the processor has it, bfloat16; on the CPU; without gradients, also those of forward mode;
    not under torch.compile, which packs by itself, nor in an export, nor a tensor of another class.
    """
    # First: torch.compile cannot trace the calls after it.
    if is_compiling() or is_exporting() or type(x) is not Tensor or x.device.type != 'cpu':
        return False
    if (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0 or not torch.backends.mkldnn.enabled:
        return False
    dtype = dtype_under_autocast(x)
    return _has_operators() and (dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16()))


@cache
def _has_operators() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_convolution_pointwise_')


@cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedConv2d:
    """A convolution without gradients, by the same kernels as ``torch.nn.functional.conv2d``.

    Args:
        weight (Tensor[C_out, C / groups, k, k]), bias (Tensor[C_out] | None): copied.
        stride, padding, groups: as of ``conv2d``; no dilation.
        size: (B, C, H, W) of the first map. Others may be of another size.

    Raises:
        TypeError: the dtype of ``weight`` is neither float32 nor bfloat16.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Optional[Tensor],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        size: Optional[torch.Size] = None,
    ) -> None:
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f'weight must be float32 or bfloat16, got {weight.dtype}')
        self._settings = list(padding), list(stride), [1, 1], groups
        self._bias = None if bias is None else bias.detach().clone()
        self._weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.detach().to_mkldnn(), *self._settings, None if size is None else list(size)
        )

    def __call__(self, x: Tensor, activation: Optional[str] = None) -> Tensor:
        """``activation(conv2d(x))``, (B, C_out, H', W'), channels_last.

        Args:
            x (Tensor[B, C, H, W]): see :func:`can_pack`; of the dtype of the weight.
            activation: 'gelu' (the exact one), 'silu' or None.

        Raises:
            ValueError: another activation.
        """
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'gelu', 'silu' or None, got {activation!r}")
        name, algorithm = _ACTIVATIONS[activation]
        x = x.contiguous(memory_format=torch.channels_last)
        out = torch.ops.mkldnn._convolution_pointwise(x, self._weight, self._bias, *self._settings, name, [], algorithm)
        return out.contiguous(memory_format=torch.channels_last)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """``out + conv2d(x)``, in the place of ``out`` where that is channels_last."""
        out, x = (each.contiguous(memory_format=torch.channels_last) for each in (out, x))
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self._weight, self._bias, *self._settings, 'add', 1.0, None, [], None
        )
        return out
