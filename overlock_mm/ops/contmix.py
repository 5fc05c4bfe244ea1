"""The ContMix operator."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from . import _reference
from ._autocast import autocast_disabled, cast_as_autocast
from ._checks import check_contmix_kernels, check_number, check_optional_tensor, check_size, check_tensor
from ._library import operator


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
    scale: float = 1.0,
) -> Tensor:
    """Context-mixing dynamic convolution: every position mixes its neighbourhood with two kernels of its own.

    A position's affinities with S x S context tokens, projected by W_d, are the logits of a small and of a large kernel.
    Relative position biases are added, and each kernel has a softmax of its own. The small kernel weights the window's sum
    of the first half of the channels, the large kernel that of the second half (paper section 3.3, eq. 1-3). Windows are
    clamped: at a border a window moves inward, so that it always lies inside the map.

    ``ks`` and ``kl`` are the kernel sizes, G the number of groups.

    Args:
        value (Tensor[B, C, H, W]): features to mix. Each half of the channels is grouped (G, C/2/G).
        query (Tensor[B, Cq, H, W]): per-position queries, grouped (G, Cq/G).
        key (Tensor[B, Cq, S, S]): context tokens, grouped as the query.
        proj_weight (Tensor[ks² + kl², S²]): W_d, from affinities to kernel logits; the small kernel's slots first.
        proj_bias (Tensor[ks² + kl²] | None): its bias.
        rpb_small (Tensor[G, 2ks-1, 2ks-1] | None): relative position bias of the small kernel, by offset.
        rpb_large (Tensor[G, 2kl-1, 2kl-1] | None): the same for the large kernel.
        num_groups: G.
        small_kernel_size: ks, odd, at most the map's smaller side.
        large_kernel_size: kl, odd, at most the map's smaller side.
        scale: factor of the affinities, such as (Cq/G)^-0.5.

    Returns:
        Tensor[B, C, H, W]: with the dtype, device and memory format of ``value``. Under autocast, with the autocast dtype.

    value, query and key share one of float16, bfloat16, float32 and float64. The parameters (W_d and the biases) have that
    dtype or float32; float64 goes only with float64. Half inputs accumulate, and go through the softmax, in float32. A
    NaN gives NaN; -inf in a bias masks its slot.

    The compiled operator has a first derivative only. It keeps its output for the backward, which raises if the output was
    overwritten (``add_``, ``ReLU(inplace=True)``). :func:`contmix_reference` supports second derivatives and the transforms
    of torch.func. It runs in torch.export, ONNX and traces.

    Raises:
        TypeError: an argument is not a tensor (or an integer), or the dtypes do not fit together.
        ValueError: a shape, a kernel size or a device does not fit; the message names the argument and what it got.
    """
    tensors = dict(value=value, query=query, key=key, proj_weight=proj_weight)
    biases = dict(proj_bias=proj_bias, rpb_small=rpb_small, rpb_large=rpb_large)
    sizes = dict(num_groups=num_groups, small_kernel_size=small_kernel_size, large_kernel_size=large_kernel_size)
    _check_kinds(tensors, biases, sizes)
    check_number('scale', scale)
    return operator('contmix')(*tensors.values(), *biases.values(), **sizes, scale=scale)


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
    """The dynamic kernels that :func:`contmix` mixes with, in plain PyTorch, to look at or to analyse.

    The arguments are those of :func:`contmix`, without ``value``. A network needs no such call: :func:`contmix` never
    writes kernels to memory, and this function takes ks² + kl² numbers for each position and group.

    Returns:
        (Tensor[B, G, H, W, ks, ks], Tensor[B, G, H, W, kl, kl]): the small and the large kernel of every position and
        group, at least in float32. Each kernel sums to 1. Slot (i, j) of the kernel at (y, x) weights the value at
        (clamp(y - k//2, 0, H - k) + i, clamp(x - k//2, 0, W - k) + j).

    Raises:
        TypeError: an argument is not a tensor (or an integer), or the dtypes do not fit together.
        ValueError: a shape, a kernel size or a device does not fit; the message names the argument and what it got.
    """
    tensors = dict(query=query, key=key, proj_weight=proj_weight)
    biases = dict(proj_bias=proj_bias, rpb_small=rpb_small, rpb_large=rpb_large)
    sizes = dict(num_groups=num_groups, small_kernel_size=small_kernel_size, large_kernel_size=large_kernel_size)
    _check_kinds(tensors, biases, sizes)
    check_number('scale', scale)
    query, key = cast_as_autocast(query), cast_as_autocast(key)
    check_contmix_kernels(query, key, proj_weight, *biases.values(), **sizes)
    with autocast_disabled(query.device.type):
        return _reference.contmix_kernels(query, key, proj_weight, *biases.values(), **sizes, scale=scale)


def _check_kinds(tensors: dict[str, Any], biases: dict[str, Any], sizes: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    for name, tensor in biases.items():
        check_optional_tensor(name, tensor)
    for name, size in sizes.items():
        check_size(name, size)
