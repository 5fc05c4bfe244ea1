"""ContMix as the published code computes it, unfused, in eager PyTorch: what the compiled operator is measured against.

Everything that the equations name is written to memory: the affinities, the logits of both kernels, their biased copies,
their softmaxes. The aggregation goes slot by slot (:func:`shifted_sums`), or through natten, as the release has it
(:func:`natten_sums`).

B images, an H x W map, G groups, S x S context tokens; a kernel has k x k slots and c = C/2/G channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from overlock_mm.ops._reference import relative_position_bias


def shifted_sums(value: Tensor, kernels: Tensor) -> Tensor:
    """Sum each position's clamped window under its own kernel: for every slot a map of neighbours, times its weights.

    Args:
        value: (B, G, c, H, W).
        kernels: (B, G, H, W, k*k).

    Returns:
        (B, G, c, H, W).
    """
    batch, groups, channels, height, width = value.shape
    kernel_size = round(kernels.shape[-1] ** 0.5)
    radius = kernel_size // 2
    maps = value.reshape(batch, groups * channels, height, width)
    # A slot's weights of all positions side by side: they are read together.
    weights = kernels.permute(0, 1, 4, 2, 3).contiguous()  # (B, G, k*k, H, W)
    out = torch.zeros_like(value)
    for i in range(kernel_size):
        for j in range(kernel_size):
            # What every window inside the map has in slot (i, j); the clamped ones at a border have what the last one has.
            whole = maps[..., i : i + height - kernel_size + 1, j : j + width - kernel_size + 1]
            neighbour = F.pad(whole, (radius,) * 4, mode='replicate').view_as(value)  # (B, G, c, H, W)
            out = out + neighbour * weights[:, :, i * kernel_size + j].unsqueeze(2)
    return out


def natten_sums(value: Tensor, kernels: Tensor) -> Tensor:
    """The same through natten's ``na2d_av``, which natten has up to version 0.17.5."""
    from natten.functional import na2d_av

    kernel_size = round(kernels.shape[-1] ** 0.5)
    channels_last = value.permute(0, 1, 3, 4, 2).contiguous()  # (B, G, H, W, c)
    out = na2d_av(kernels, channels_last, kernel_size=kernel_size, dilation=1)
    return out.permute(0, 1, 4, 2, 3)


def contmix_published(
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
    aggregate: Callable[[Tensor, Tensor], Tensor] = shifted_sums,
) -> Tensor:
    """:func:`overlock_mm.ops.contmix`, unfused. Half types as under autocast: a softmax in float32, all else in half."""
    batch, channels, height, width = value.shape
    dtype = value.dtype
    query_channels, tokens = key.shape[1] // num_groups, key.shape[2] * key.shape[3]
    q = (query * scale).reshape(batch, num_groups, query_channels, height * width)  # (B, G, Cq/G, HW)
    k = key.reshape(batch, num_groups, query_channels, tokens)  # (B, G, Cq/G, S²)
    affinity = q.transpose(-2, -1) @ k  # (B, G, HW, S²)
    bias = None if proj_bias is None else proj_bias.to(dtype)
    logits = F.linear(affinity, proj_weight.to(dtype), bias)  # (B, G, HW, ks² + kl²)

    outputs = []
    branches = ((small_kernel_size, rpb_small), (large_kernel_size, rpb_large))
    split_logits = logits.split([small_kernel_size**2, large_kernel_size**2], dim=-1)
    for half, z, (kernel_size, rpb) in zip(value.chunk(2, dim=1), split_logits, branches):
        z = z.reshape(batch, num_groups, height, width, kernel_size**2)  # (B, G, H, W, k²)
        if rpb is not None:
            z = z + relative_position_bias(rpb.to(dtype), height, width).flatten(-2)  # (B, G, H, W, k²)
        exact = torch.promote_types(dtype, torch.float32)
        p = z.softmax(dim=-1, dtype=exact).to(dtype)  # (B, G, H, W, k²)
        v = half.reshape(batch, num_groups, channels // 2 // num_groups, height, width)  # (B, G, c, H, W)
        outputs.append(aggregate(v, p).reshape(batch, channels // 2, height, width))  # (B, C/2, H, W)
    return torch.cat(outputs, dim=1)  # (B, C, H, W)


contmix_natten = partial(contmix_published, aggregate=natten_sums)
