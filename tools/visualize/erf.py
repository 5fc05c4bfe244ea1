"""Effective receptive fields, beside those of ConvNeXt and Swin of mmpretrain.

The field of a stage is the mean gradient of the centre of its map, summed over the channels, with respect to the pixels
(Luo et al., NeurIPS 2016). As in RepLKNet (Ding et al., CVPR 2022), only positive gradients count, and colours are summed.
The squares hold 50 % and 99 % of the field.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn as nn
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.registry import MODELS
from torch import Tensor

from overlock_mm.checkpoints.files import read_checkpoint, released_state_dict
from overlock_mm.models.overlock import STAGES

from .networks import Network, arch_of, as_map, load_network, normalised, read_picture, recorded
from .page import Page, plt, show

SHARES = {0.5: 'white', 0.99: '#7fd4ff'}  # of the field, in squares of these colours
SMALLEST_SHOWN = 1e-3  # of the largest gradient


class Candidate(NamedTuple):
    """A network, and the blocks whose fields are drawn, by their titles."""

    name: str
    weights: str
    network: nn.Module
    blocks: dict[str, nn.Module]


class Field(NamedTuple):
    """Where the centre of a map looks.

    Attributes:
        gradient: (H, W), of the pixels.
        centre: row and column of the pixel in the middle of the position.
    """

    gradient: np.ndarray
    centre: tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--stage',
        action='append',
        choices=STAGES,
        help='stage of OverLoCK, can be repeated (default: the four that a pyramid takes)',
    )
    parser.add_argument('--size', type=int, default=512, help='side of the squares that are cut out (default: 512)')
    parser.add_argument('--convnext', metavar='FILE', help="weights of mmpretrain's ConvNeXt (default: random)")
    parser.add_argument('--swin', metavar='FILE', help="weights of mmpretrain's Swin (default: random)")


def run(args: argparse.Namespace, page: Page) -> None:
    network = load_network(args.arch, args.config, args.checkpoint)
    stages = args.stage or ['blocks1', 'blocks2', 'sub_blocks3', 'sub_blocks4']
    candidates = [overlock(network, stages), *others(arch_of(network.backbone), stages, args.convnext, args.swin)]
    images = [normalised(read_picture(file, args.size, square=True), network) for file in args.pictures]
    fields = [receptive_fields(each.network, each.blocks, images) for each in candidates]
    pictures = '1 picture' if len(images) == 1 else f'{len(images)} pictures'
    sources = '; '.join(f'{each.name}: {each.weights}' for each in candidates)
    caption = (
        f'Effective receptive fields: gradient of the centre, mean over {pictures} of {args.size} x '
        f'{args.size}. Squares hold 50 % and 99 % of it. {sources}.'
    )
    if any(each.weights == 'random weights' for each in candidates):
        caption += ' Only trained weights compare networks: a random ConvNeXt, for one, starts near the identity.'
    page.add_figure(draw(candidates, fields), 'erf', caption)


# Networks.


def overlock(network: Network, stages: list[str]) -> Candidate:
    backbone = network.backbone
    blocks = {stage: getattr(backbone, stage)[-1] for stage in stages}
    return Candidate(network.name, network.weights, backbone, blocks)


def others(arch: str, stages: list[str], convnext: Optional[str], swin: Optional[str]) -> Iterator[Candidate]:
    """ConvNeXt and Swin of about the same size, with the stages at the same strides.

    Raises:
        ValueError: a checkpoint does not fit.
    """
    size = {'s': 'small', 'b': 'base'}.get(arch, 'tiny')
    letter = size[0].upper()
    yield other(f'ConvNeXt-{letter}', dict(type='mmpretrain.ConvNeXt', arch=size), stages, convnext)
    yield other(f'Swin-{letter}', dict(type='mmpretrain.SwinTransformer', arch=size, pad_small_map=True), stages, swin)


def other(name: str, cfg: dict[str, Any], stages: list[str], checkpoint: Optional[str]) -> Candidate:
    torch.manual_seed(0)
    backbone = MODELS.build(cfg).requires_grad_(False)
    backbone.eval()  # which returns None
    weights = 'random weights'
    if checkpoint is not None:
        weights = f'weights of {Path(checkpoint).name}'
        state_dict = released_state_dict(read_checkpoint(checkpoint), checkpoint)
        prefix = 'backbone.'  # of the released classifiers
        try:
            backbone.load_state_dict(
                {key[len(prefix) :]: each for key, each in state_dict.items() if key.startswith(prefix)}
            )
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit {name} of mmpretrain: {error}') from error
    # The maps before the norms of the outputs. The sum over channels of a norm's output is a constant.
    blocks = {}
    for number in (int(stage[-1]) for stage in stages):
        stage = backbone.stages[number - 1]
        blocks[f'stage {number}'] = getattr(stage, 'blocks', stage)[-1]
    return Candidate(name, weights, backbone, blocks)


# Fields.


def receptive_fields(network: nn.Module, blocks: dict[str, nn.Module], images: Iterable[Tensor]) -> dict[str, Field]:
    """Mean positive gradient of the centre of each block's map, at (h // 2, w // 2), with respect to the pixels.

    Args:
        network: takes an image.
        blocks: of the network, by name.
        images: each (1, 3, H, W), all of one size.

    Returns:
        A field for each block.
    """
    gradients: dict[str, list[Tensor]] = {name: [] for name in blocks}
    centres = {}
    for image in images:
        image = image.clone().requires_grad_()
        with recorded(blocks) as outputs:
            network(image)
        for name in blocks:
            features = as_map(outputs[name])
            position = tuple(size // 2 for size in features.shape[2:])
            (gradient,) = torch.autograd.grad(features[..., position[0], position[1]].sum(), image, retain_graph=True)
            gradients[name].append(gradient.relu().sum(dim=(0, 1)))
            scales = (pixels / size for pixels, size in zip(image.shape[2:], features.shape[2:]))
            centres[name] = tuple(int((index + 0.5) * scale) for index, scale in zip(position, scales))
    return {name: Field(torch.stack(gradients[name]).mean(dim=0).numpy(), centres[name]) for name in blocks}


def side_that_holds(field: Field, share: float) -> int:
    """The side, in pixels, of the smallest square around the centre that holds a share of the field."""
    rows, columns = np.indices(field.gradient.shape)
    distance = np.maximum(abs(rows - field.centre[0]), abs(columns - field.centre[1]))
    within = np.cumsum(np.bincount(distance.ravel(), weights=field.gradient.ravel()))  # by the distance, in float64
    return 2 * int(np.argmax(within >= share * within[-1] * (1 - 1e-9))) + 1


def draw(candidates: list[Candidate], fields: list[dict[str, Field]]) -> Figure:
    """A row for each network, a column for each stage."""
    columns = max(map(len, fields))
    figure, axes = plt.subplots(
        len(fields), columns, figsize=(2.6 * columns + 1, 2.95 * len(fields)), squeeze=False, layout='compressed'
    )
    for row, candidate, of_network in zip(axes, candidates, fields):
        for axis, (title, field) in zip(row, of_network.items()):
            sides = {share: side_that_holds(field, share) for share in SHARES}
            area = 100 * sides[0.5] ** 2 / field.gradient.size
            relative = field.gradient / field.gradient.max()
            norm = LogNorm(SMALLEST_SHOWN, 1, clip=True)
            image = show(axis, relative, f'{title}\nhalf in {area:.2g} % of the area', cmap='magma', norm=norm)
            for share, side in sides.items():
                corner = field.centre[1] - side / 2, field.centre[0] - side / 2
                axis.add_patch(Rectangle(corner, side, side, fill=False, color=SHARES[share], linewidth=1))
        for axis in row[len(of_network) :]:
            axis.remove()
        row[0].set_ylabel(candidate.name, fontsize=11)
    figure.colorbar(image, ax=axes, label='gradient / largest gradient', shrink=0.6)
    return figure
