"""Context-mixing dynamic convolution (ContMix) in plain PyTorch: the paper's equations, a line each, with shapes.

B images, C channels, an H x W map, G groups, S x S context tokens. A branch has a kernel of k x k *slots* and c = C/2/G
channels per group.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def window_starts(size: int, kernel_size: int, device: Optional[torch.device] = None) -> Tensor:
    """First index of each position's window along an axis of ``size``: (size,). At a border the window moves inward."""
    positions = torch.arange(size, device=device)
    return (positions - kernel_size // 2).clamp(0, size - kernel_size)


def relative_position_bias(rpb: Tensor, height: int, width: int) -> Tensor:
    """Lay out biases that go by offset, (G, 2k-1, 2k-1), by position and window slot: (G, H, W, k, k).

    The slot that holds neighbour j of position p takes the entry j - p + k - 1 of each axis.
    """
    kernel_size = (rpb.shape[-1] + 1) // 2
    slots = torch.arange(kernel_size, device=rpb.device)
    entries = []
    for size in (height, width):
        positions = torch.arange(size, device=rpb.device).unsqueeze(-1)  # (size, 1)
        neighbours = window_starts(size, kernel_size, rpb.device).unsqueeze(-1) + slots  # (size, k)
        entries.append((neighbours - positions + kernel_size - 1).flatten())  # (size * k)
    rows, columns = entries
    bias = rpb.index_select(1, rows).index_select(2, columns)  # (G, H*k, W*k)
    return bias.view(-1, height, kernel_size, width, kernel_size).transpose(2, 3)  # (G, H, W, k, k)


def aggregate(value: Tensor, kernels: Tensor) -> Tensor:
    """Sum each position's clamped window under its own kernel.

    Along a line of the map, one row of all its kernels is a W x W matrix with a band of k numbers a row, which multiplies
    the line of values: k matrix products in all. An unfolded map would take k*k times the memory of the map, and a sum
    shifted slot by slot k*k passes over it. The bands, k * G * H * W * W numbers an image, are kept for the backward.

    Args:
        value: (B, G, c, H, W).
        kernels: (B, G, H, W, k, k), a weight for every slot of every position.

    Returns:
        (B, G, c, H, W).
    """
    batch, groups, height, width, kernel_size = kernels.shape[:5]
    rows = window_starts(height, kernel_size, value.device)  # (H)
    slots = torch.arange(kernel_size, device=value.device)
    columns = window_starts(width, kernel_size, value.device).unsqueeze(-1) + slots  # (W, k)
    columns = columns.expand(batch, groups, height, width, kernel_size)
    value = value.permute(0, 1, 3, 4, 2)  # (B, G, H, W, c)
    out = torch.zeros_like(value)
    for i in range(kernel_size):
        band = kernels.new_zeros(batch, groups, height, width, width).scatter(-1, columns, kernels[..., i, :])
        out = out + band @ value.index_select(2, rows + i)  # (B, G, H, W, W) @ (B, G, H, W, c)
    return out.permute(0, 1, 4, 2, 3)


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
) -> Tensor:
    """:func:`overlock_mm.ops.contmix` without a compiled operator: the oracle, the fallback, the path that exports.

    It materialises everything, as the published code does, and is differentiable as often as one likes.
    """
    batch, channels, height, width = value.shape
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    query, key, proj_weight = query.to(dtype), key.to(dtype), proj_weight.to(dtype)

    query_channels, tokens = key.shape[1] // num_groups, key.shape[2] * key.shape[3]
    q = query.reshape(batch, num_groups, query_channels, height * width)  # (B, G, Cq/G, HW)
    k = key.reshape(batch, num_groups, query_channels, tokens)  # (B, G, Cq/G, S²)
    affinity = q.transpose(-2, -1) @ k  # (B, G, HW, S²): of every position with every context token (eq. 1)
    logits = affinity @ proj_weight.t()  # (B, G, HW, ks² + kl²): W_d makes kernels of them (eq. 2)
    if proj_bias is not None:
        logits = logits + proj_bias.to(dtype)

    outputs = []
    branches = ((small_kernel_size, rpb_small), (large_kernel_size, rpb_large))
    split_logits = logits.split([small_kernel_size**2, large_kernel_size**2], dim=-1)
    for half, branch_logits, (kernel_size, rpb) in zip(value.chunk(2, dim=1), split_logits, branches):
        z = branch_logits.reshape(batch, num_groups, height, width, kernel_size, kernel_size)  # (B, G, H, W, k, k)
        if rpb is not None:
            z = z + relative_position_bias(rpb.to(dtype), height, width)  # (B, G, H, W, k, k)
        p = z.flatten(-2).softmax(dim=-1).view_as(z)  # (B, G, H, W, k, k): every kernel sums to 1
        v = half.to(dtype).reshape(batch, num_groups, channels // 2 // num_groups, height, width)  # (B, G, c, H, W)
        outputs.append(aggregate(v, p).reshape(batch, channels // 2, height, width))  # (B, C/2, H, W) (eq. 3)
    return torch.cat(outputs, dim=1).to(value.dtype)  # (B, C, H, W)
