"""The dynamic kernels of chosen positions, over the photograph.

Every position of Focus-Net has kernels of its own, made from the picture (section 3.3). A kernel is shown over the part
of the picture that it mixes. Its weights are in multiples of the mean weight: 1 is an average, red is more, blue is
less.
"""

from __future__ import annotations

import argparse
import re

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import DynamicBlock
from overlock_mm.models.layers import as_matrix
from overlock_mm.ops import contmix_kernels
from overlock_mm.ops._reference import window_starts

from .networks import load_network, normalised, read_picture, recorded
from .page import Page, enlarged, plt, show

COLOURS = ('#ff4d4d', '#ffd23f', '#4dd2ff', '#7cfc6a', '#ff8cf0', '#ffa64d')  # of the positions
STAGES = ('sub_blocks3', 'sub_blocks4')
DEFAULT_PLACES = [(0.5, 0.5), (0.25, 0.35), (0.97, 0.97)]


def place_of(text: str) -> tuple[float, float]:
    parts = text.split(',')
    if len(parts) != 2 or not all(re.fullmatch(r'(\d*\.)?\d+', each) and float(each) <= 1 for each in parts):
        raise argparse.ArgumentTypeError(f'--at must be X,Y in parts of the width and the height, as 0.5,0.25, got {text}')
    return float(parts[0]), float(parts[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--size', type=int, default=512, help='shorter side of the pictures (default: 512)')
    parser.add_argument(
        '--at',
        action='append',
        type=place_of,
        metavar='X,Y',
        help='a position, in parts of the width and the height, can be repeated (default: three)',
    )
    parser.add_argument('--stage', choices=STAGES, default=STAGES[0], help=f'of Focus-Net (default: {STAGES[0]})')
    parser.add_argument('--block', type=int, default=-1, help='block of the stage, from 0 (default: the last)')


def run(args: argparse.Namespace, page: Page) -> None:
    network = load_network(args.arch, args.config, args.checkpoint)
    stage = getattr(network.backbone, args.stage)
    if not -len(stage) <= args.block < len(stage):
        raise ValueError(f'--block must be in -{len(stage)}..{len(stage) - 1} for {args.stage}, got {args.block}')
    number = range(len(stage))[args.block]
    for file in args.pictures:
        picture = read_picture(file, args.size)
        kernels = dynamic_kernels(network.backbone, stage[number], normalised(picture, network))
        caption = (
            f'{file.name}, {network.name}, {network.weights}. Dynamic kernels of {args.stage}, block {number + 1} of '
            f'{len(stage)}, in multiples of the mean weight: red is more than an average, blue is less. '
            f'Mean over {len(kernels[0])} groups, and the group whose large kernel has the largest weight.'
        )
        page.add_figure(draw(picture, kernels, args.at or DEFAULT_PLACES), f'{file.stem}_kernels', caption)


def dynamic_kernels(backbone: OverLoCK, block: DynamicBlock, image: Tensor) -> tuple[Tensor, Tensor]:
    """The small and the large kernels of a block for an image (1, 3, H, W): (G, h, w, k, k) each, on the block's map.

    A map that is too small for the large kernel is enlarged by the block (:func:`overlock_mm.models.blocks.
    mix_at_fitting_size`); h and w are then those of the enlarged map.
    """
    with torch.no_grad(), recorded(dict(query=block.weight_query, key=block.weight_key)) as outputs:
        backbone(image)
        weight, bias = as_matrix(block.weight_proj, block.context_size**2, like=block.rpb1)
        small, large = contmix_kernels(
            outputs['query'],
            outputs['key'],
            weight,
            bias,
            block.rpb1,
            block.rpb2,
            num_groups=block.num_groups,
            small_kernel_size=block.small_kernel_size,
            large_kernel_size=block.kernel_size,
            scale=block.query_scale,
        )
    return small[0], large[0]


def position_at(place: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """Row and column of the position of a map that holds a place, (x, y) in parts of the width and the height."""
    x, y = place
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


def window_at(position: tuple[int, int], kernel_size: int, height: int, width: int) -> tuple[int, int]:
    """First row and column of the window of a position. At a border it moves inward."""
    return tuple(int(window_starts(size, kernel_size)[i]) for i, size in zip(position, (height, width)))


def kernels_at(position: tuple[int, int], kernels: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What is drawn for a position, (k, k) each: the means over the groups, and the group with the largest weight."""
    small, large = (each[:, position[0], position[1]] for each in kernels)  # (G, k, k)
    group = int(large.flatten(1).amax(dim=1).argmax())
    small_size, large_size = (f'{each.shape[-1]} x {each.shape[-1]}' for each in (small, large))
    return {
        f'{small_size}, mean of the groups': small.mean(dim=0),
        f'{large_size}, mean of the groups': large.mean(dim=0),
        f'{large_size}, group {group + 1} of {len(large)}': large[group],
    }


def draw(picture: np.ndarray, kernels: tuple[Tensor, Tensor], places: list[tuple[float, float]]) -> Figure:
    """A row for each place: the picture with the windows, and the kernels over the parts of the picture in them."""
    height, width = picture.shape[:2]
    rows, columns = kernels[0].shape[1:3]
    scale = height / rows, width / columns  # of a position, in pixels
    panel = 2.9
    figure, axes = plt.subplots(
        len(places), 4, figsize=(4 * panel + panel * (width / height - 1) + 1, panel * len(places) + 0.3), squeeze=False,
        layout='compressed', width_ratios=(width / height, 1, 1, 1),
    )  # fmt: skip
    for index, place in enumerate(places):
        row, column = position_at(place, rows, columns)
        colour = COLOURS[index % len(COLOURS)]
        show(axes[index, 0], picture, f'row {row}, column {column}')
        shown = kernels_at((row, column), kernels)
        largest = max(2, *(float(kernel.max() * kernel.numel()) for kernel in shown.values()))
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=largest)
        for axis, (title, kernel) in zip(axes[index, 1:], shown.items()):
            size = kernel.shape[-1]
            top, left = window_at((row, column), size, rows, columns)
            corner, extent = (left * scale[1], top * scale[0]), (size * scale[1], size * scale[0])
            axes[index, 0].add_patch(Rectangle(corner, *extent, fill=False, color=colour, linewidth=1.5))
            crop = picture[int(corner[1]) : round(corner[1] + extent[1]), int(corner[0]) : round(corner[0] + extent[0])]
            grey = crop.mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8)
            show(axis, grey, title)
            multiples = enlarged(kernel.numpy() * size**2, *grey.shape[:2])
            # Where the kernel averages, the picture shows through.
            alpha = 0.7 * abs(norm(multiples) - norm(1)) / 0.5
            image = axis.imshow(multiples, cmap='coolwarm', norm=norm, alpha=alpha)
            here = ((column - left + 0.5) * scale[1], (row - top + 0.5) * scale[0])
            axis.plot(*here, marker='o', markersize=5, markerfacecolor='none', color=colour)
        figure.colorbar(image, ax=axes[index], label='weight / mean weight', shrink=0.75).solids.set_alpha(1)
        axes[index, 0].plot((column + 0.5) * scale[1], (row + 0.5) * scale[0], marker='o', markersize=4, color=colour)
    return figure
