"""What the context prior sees, and how the features of Focus-Net change with it.

Colours are the three main directions of a map's channels: positions of one colour have similar features. The change is that
of the features when the prior has the same value everywhere, its mean: what Focus-Net then lacks is where things are.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from overlock_mm.models import OverLoCK

from .networks import Network, load_network, normalised, read_picture, recorded
from .page import Page, enlarged, plt, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--size', type=int, default=512, help='shorter side of the pictures (default: 512)')


def run(args: argparse.Namespace, page: Page) -> None:
    network = load_network(args.arch, args.config, args.checkpoint)
    for file in args.pictures:
        picture = read_picture(file, args.size)
        image = normalised(picture, network)
        features = network_maps(network.backbone, image)
        with prior_without_places(network.backbone):
            changed = network_maps(network.backbone, image)
        page.add_figure(draw(picture, features, changed), f'{file.stem}_prior', caption_for(file, network))


def caption_for(file: Path, network: Network) -> str:
    return (
        f'{file.name}, {network.name}, {network.weights}. Colours: the three main directions of the channels of each map. '
        'Change: of the features of Focus-Net when the context prior is replaced by its mean over the picture.'
    )


# Maps.


def network_maps(backbone: OverLoCK, image: Tensor) -> dict[str, Tensor]:
    """Features (C, H, W), without the context, on the way through the three sub-networks."""
    focus = backbone.sub_blocks3
    middle = len(focus) // 2
    layers = {
        'Base-Net\nblocks3': backbone.blocks3[-1],
        'Overview-Net\nblocks4': backbone.blocks4[-1],
        'context prior\nhigh_level_proj': backbone.high_level_proj,
        **{f'Focus-Net\nsub_blocks3, block {i + 1}': focus[i] for i in sorted({0, middle, len(focus) - 1})},
        'Focus-Net\nsub_blocks4': backbone.sub_blocks4[-1],
    }
    with torch.no_grad(), recorded(layers) as outputs:
        backbone(image)
    maps = {name: output if isinstance(output, Tensor) else output[0] for name, output in outputs.items()}
    # The last block does not divide its output.
    channels = backbone.sub_blocks4[-1].channels
    return {name: maps[name][0, :channels] for name in layers}


@contextlib.contextmanager
def prior_without_places(backbone: OverLoCK) -> Iterator[None]:
    """Context in which the context prior has its mean at every position."""

    def flatten(module, inputs, output: Tensor) -> Tensor:
        return output.mean(dim=(2, 3), keepdim=True).expand_as(output)

    hook = backbone.high_level_proj.register_forward_hook(flatten)
    try:
        yield
    finally:
        hook.remove()


def main_colours(features: Tensor) -> np.ndarray:
    """The three main directions (PCA) of the channels of a map (C, H, W), as colours (H, W, 3) in 0..1.

    Each direction fills its colour's range, but for the outermost percent of the positions.
    """
    channels, height, width = features.shape
    points = features.flatten(1).t().double()  # (HW, C)
    points = points - points.mean(dim=0)
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    # A direction and its opposite are equally good: the largest entry is positive.
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    projected = points @ (directions * largest.sign()).t()  # (HW, 3)
    low, high = (torch.quantile(projected, q, dim=0) for q in (0.01, 0.99))
    colours = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))  # of a map of one position
    return colours.view(height, width, 3).numpy()


def relative_change(features: Tensor, changed: Tensor) -> np.ndarray:
    """|changed - features| / |features| of the channels, at each position of maps (C, H, W): (H, W)."""
    return ((changed - features).norm(dim=0) / features.norm(dim=0).clamp(min=1e-12)).numpy()


def draw(picture: np.ndarray, features: dict[str, Tensor], changed: dict[str, Tensor]) -> Figure:
    height, width = picture.shape[:2]
    panel = (2.6, 2.6 * height / width + 0.45)
    names = list(features)
    focus = [name for name in names if name.startswith('Focus-Net')]
    changes = {name: relative_change(features[name], changed[name]) for name in focus}
    largest = max(change.max() for change in changes.values())
    figure, axes = plt.subplots(3, 4, figsize=(4 * panel[0] + 0.8, 3 * panel[1]), squeeze=False, layout='compressed')
    for axis in axes.flat:
        axis.set_axis_off()
    show(axes[0, 0], picture, 'picture')
    for axis, name in zip(axes[0, 1:], [name for name in names if name not in focus]):
        show(axis, enlarged(main_colours(features[name]), height, width), name)
    for column, name in enumerate(focus):
        show(axes[1, column], enlarged(main_colours(features[name]), height, width), name)
        change = enlarged(changes[name], height, width)
        title = f'change, mean {100 * changes[name].mean():.2g} %'
        image = show(axes[2, column], 100 * change, title, cmap='viridis', vmin=0, vmax=100 * largest)
    figure.colorbar(image, ax=axes[2, :], label='change in %', shrink=0.8)
    return figure
