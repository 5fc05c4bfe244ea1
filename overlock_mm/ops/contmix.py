"""The ContMix operator: the compiled one where there is one, else the reference.

The compiled operator checks its own arguments (csrc/contmix.cpp); the checks here, for the reference, say the same.
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
from torch import Tensor

from . import _extension
from ._autocast import cast_as_autocast
from ._maps import DTYPES, is_channels_last
from ._overridable import overridable
from ._reference import contmix_reference


@overridable
def contmix(
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
) -> Tensor:
    """Context-mixing dynamic convolution: every position mixes its neighbourhood with two kernels of its own.

    A position's affinities with S x S context tokens, projected by W_d, are the logits of a small and of a large kernel;
    relative position biases are added, each kernel goes through a softmax on its own, and the first half of the channels
    is summed under the small one, the second half under the large one (paper section 3.3, eq. 1-3). A window is clamped:
    at a border it moves inward, so that it always lies inside the map.

    ``ks`` and ``kl`` are the kernel sizes, G the number of groups.

    Args:
        value (Tensor[B, C, H, W]): features to mix. Each half of the channels is grouped (G, C/2/G).
        query (Tensor[B, Cq, H, W]): per-position queries, already scaled, grouped (G, Cq/G).
        key (Tensor[B, Cq, S, S]): context tokens, grouped as the query.
        proj_weight (Tensor[ks² + kl², S²]): W_d, from affinities to kernel logits; the small kernel's slots first.
        proj_bias (Tensor[ks² + kl²] | None): its bias.
        rpb_small (Tensor[G, 2ks-1, 2ks-1] | None): relative position bias of the small kernel, by offset.
        rpb_large (Tensor[G, 2kl-1, 2kl-1] | None): the same for the large kernel.
        num_groups: G.
        small_kernel_size: ks, odd, at most the map's smaller side.
        large_kernel_size: kl, odd, at most the map's smaller side.

    Returns:
        Tensor[B, C, H, W]: with the dtype, device and memory format of ``value``. Under autocast, with the autocast dtype.

    value, query and key share one of float16, bfloat16, float32 and float64. The parameters (W_d and the biases) have that
    dtype or float32; float64 goes only with float64. Half inputs accumulate, and go through the softmax, in float32. A
    NaN gives NaN; -inf in a bias masks its slot.

    The compiled operator has a first derivative only, and keeps its output for it: write over the output (``add_``,
    ``ReLU(inplace=True)``) and the backward raises. Second derivatives and torch.func's transforms are what
    :func:`contmix_reference` is for, and it is what runs in torch.export, ONNX and traces.

    Raises:
        TypeError: an argument is no tensor (or no integer), or the dtypes do not go together.
        ValueError: a shape, a kernel size or a device does not fit; the message names the argument and what it got.
    """
    tensors = dict(
        value=value, query=query, key=key, proj_weight=proj_weight,
        proj_bias=proj_bias, rpb_small=rpb_small, rpb_large=rpb_large,
    )  # fmt: skip
    sizes = dict(num_groups=num_groups, small_kernel_size=small_kernel_size, large_kernel_size=large_kernel_size)
    _check_types(tensors, sizes)
    if not _extension.is_exporting() and _extension.compiled_for(value.device):
        return torch.ops.overlock_mm.contmix(**tensors, **sizes)
    return _uncompiled(tensors, sizes)


def _uncompiled(tensors: dict[str, Optional[Tensor]], sizes: dict[str, int]) -> Tensor:
    """What the compiled operator does with its arguments, around the reference: autocast, checks, memory format."""
    value = tensors['value']
    device_type = value.device.type
    for name in ('value', 'query', 'key'):
        tensors[name] = cast_as_autocast(tensors[name])
    _check_dtypes_and_devices(tensors)
    _check_shapes(**tensors, **sizes)
    with contextlib.nullcontext() if device_type == 'meta' else torch.autocast(device_type, enabled=False):
        out = contmix_reference(**tensors, **sizes)
    if is_channels_last(value):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _check_types(tensors: dict[str, Optional[Tensor]], sizes: dict[str, int]) -> None:
    for name, tensor in tensors.items():
        optional = name in ('proj_bias', 'rpb_small', 'rpb_large')
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            raise TypeError(f'{name} must be a Tensor{" or None" if optional else ""}, got {type(tensor).__name__}')
    for name, size in sizes.items():
        # SymInt: sizes under torch.compile may be symbolic.
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f'{name} must be an int, got {size!r}')
        if size < 1:
            raise ValueError(f'{name} must be at least 1, got {size}')


def _check_dtypes_and_devices(tensors: dict[str, Optional[Tensor]]) -> None:
    value = tensors['value']
    if value.dtype not in DTYPES:
        raise TypeError(f'value must be float16, bfloat16, float32 or float64, got {value.dtype}')
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != value.device:
            raise ValueError(f'{name} must be on the device of value, {value.device}, got {tensor.device}')
        if name in ('query', 'key'):
            allowed = {value.dtype}
        else:
            allowed = {value.dtype} if value.dtype == torch.float64 else {value.dtype, torch.float32}
        if tensor.dtype not in allowed:
            names = ' or '.join(sorted(str(dtype) for dtype in allowed))
            raise TypeError(f'{name} must have dtype {names} with a value of {value.dtype}, got {tensor.dtype}')


def _check_shapes(
    value, query, key, proj_weight, proj_bias, rpb_small, rpb_large, num_groups, small_kernel_size, large_kernel_size
) -> None:
    for name, tensor, rank in (('value', value, 4), ('query', query, 4), ('key', key, 4), ('proj_weight', proj_weight, 2)):
        if tensor.ndim != rank:
            raise ValueError(f'{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}')
    batch, channels, height, width = value.shape
    if channels == 0 or channels % (2 * num_groups):
        raise ValueError(f'value must have channels divisible by 2 * num_groups = {2 * num_groups}, got {channels}')
    if query.shape[1] == 0 or query.shape[1] % num_groups:
        raise ValueError(f'query must have channels divisible by num_groups = {num_groups}, got {query.shape[1]}')
    if (query.shape[0], *query.shape[2:]) != (batch, height, width):
        raise ValueError(
            f'query must have the batch and map of value, ({batch}, *, {height}, {width}), got shape {tuple(query.shape)}'
        )
    if tuple(key.shape[:2]) != tuple(query.shape[:2]):
        raise ValueError(f'key must have shape ({batch}, {query.shape[1]}, S, S), got {tuple(key.shape)}')
    for name, kernel_size in (('small_kernel_size', small_kernel_size), ('large_kernel_size', large_kernel_size)):
        if kernel_size % 2 == 0:
            raise ValueError(f'{name} must be odd, got {kernel_size}')
        if kernel_size > min(height, width):
            raise ValueError(f"{name} must be at most the map's smaller side, {min(height, width)}, got {kernel_size}")
    slots, tokens = small_kernel_size**2 + large_kernel_size**2, key.shape[2] * key.shape[3]
    expected = {
        'proj_weight': (proj_weight, (slots, tokens)),
        'proj_bias': (proj_bias, (slots,)),
        'rpb_small': (rpb_small, (num_groups, 2 * small_kernel_size - 1, 2 * small_kernel_size - 1)),
        'rpb_large': (rpb_large, (num_groups, 2 * large_kernel_size - 1, 2 * large_kernel_size - 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must have shape {shape}, got {tuple(tensor.shape)}')
