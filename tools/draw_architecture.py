"""Draw the architecture of OverLoCK. Depths, kernels and shapes come from a network that is built and run for it.

    python tools/draw_architecture.py                                     # docs/images/architecture.svg: T at 224 x 224
    python tools/draw_architecture.py --arch b --size 384 --out b.png

A bar is a block, and its height shows the size of the map.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
from torch import Tensor
from visualize.networks import recorded

from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

OUT = Path(__file__).resolve().parents[1] / 'docs' / 'images' / 'architecture.svg'
BASE, OVERVIEW, FOCUS = '#2f6db3', '#d9822b', '#2a8c5c'  # the colours of the sub-networks
INK, PALE = '#24292f', '#57606a'


class Stage(NamedTuple):
    """A stage and its output.

    Attributes:
        name: in the code.
        blocks: their number.
        kernels: sizes of the large convolution, or of the dynamic kernels.
        size: height and width of the map.
        channels: of the features, and of the context if there is one.
    """

    name: str
    blocks: int
    kernels: tuple[int, ...]
    size: tuple[int, int]
    channels: tuple[int, ...]

    @property
    def shape(self) -> str:
        """As in 14 × 14 × (256 + 128)."""
        channels = ' + '.join(map(str, self.channels))
        return ' × '.join(map(str, self.size)) + (f' × ({channels})' if len(self.channels) > 1 else f' × {channels}')


class Architecture(NamedTuple):
    name: str
    size: int  # height and width of the image
    stages: dict[str, Stage]
    prior: str  # shape of the context prior
    parameters: dict[str, int]  # of each sub-network

    def describe(self) -> str:
        """All values of the figure, in words."""
        stages = '; '.join(
            f'{each.name}: {each.blocks} blocks, kernels {kernels_of(each)}, map {each.shape}'
            for each in self.stages.values()
        )
        millions = ', '.join(f'{name} {number / 1e6:.1f} M' for name, number in self.parameters.items())
        return f'{self.name} at {self.size} × {self.size}. {stages}; context prior: {self.prior}. Parameters: {millions}.'


def kernels_of(stage: Stage) -> str:
    return ' and '.join(f'{size} × {size}' for size in stage.kernels)


def read_architecture(arch: str, size: int) -> Architecture:
    """Build a network on the meta device, and run it on an image of ``size`` x ``size``."""
    with torch.device('meta'):
        backbone = OverLoCK(arch).eval()
        image = torch.empty(1, 3, size, size)
    names = ('blocks1', 'blocks2', 'blocks3', 'blocks4', 'sub_blocks3', 'sub_blocks4')
    layers = {name: getattr(backbone, name)[-1] for name in names}
    with torch.no_grad(), recorded({**layers, 'prior': backbone.high_level_proj}) as outputs:
        backbone(image)
    stages = {}
    for name, block in layers.items():
        output, blocks = outputs[name], getattr(backbone, name)
        if name.startswith('sub_'):
            # The last block does not divide its output.
            channels = (block.channels, block.context_channels)
            size_of_map = (output if isinstance(output, Tensor) else output[0]).shape[2:]
            kernels = (block.small_kernel_size, block.kernel_size)
        else:
            channels, size_of_map = (output.shape[1],), output.shape[2:]
            kernels = (block.proj[1].lk_origin.kernel_size[0],)
        stages[name] = Stage(name, len(blocks), kernels, tuple(size_of_map), channels)
    _, channels, height, width = outputs['prior'].shape
    parts = {
        'Base-Net': ('patch_embed1', 'patch_embed2', 'patch_embed3', 'blocks1', 'blocks2', 'blocks3'),
        'Overview-Net': ('patch_embed4', 'blocks4', 'high_level_proj'),
        'Focus-Net': ('patch_embedx', 'sub_blocks3', 'sub_blocks4'),
    }
    parameters = {name: sum(count(getattr(backbone, part)) for part in modules) for name, modules in parts.items()}
    return Architecture(f'OverLoCK-{arch.upper()}', size, stages, f'{height} × {width} × {channels}', parameters)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The figure, in units of an inch.

# Where the middles of the stages are.
PLACES = {
    'blocks1': (2.3, 2.97), 'blocks2': (3.87, 2.97), 'blocks3': (5.44, 2.97), 'blocks4': (8.12, 4.72),
    'sub_blocks3': (8.5, 1.55), 'sub_blocks4': (11.2, 1.55),
}  # fmt: skip
PRIOR = (11.2, 4.72)


def draw(architecture: Architecture) -> Figure:
    figure = plt.figure(figsize=(12.6, 5.9))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 12.6), ylim=(0, 5.9))
    axes.set_axis_off()
    size = architecture.size

    panel(axes, 1.5, 1.55, 4.75, 2.9, BASE, 'Base-Net', 'encodes the image', architecture)
    panel(axes, 6.75, 3.45, 2.75, 2.3, OVERVIEW, 'Overview-Net', 'looks at the whole', architecture)
    panel(axes, 6.75, 0.2, 5.65, 2.65, FOCUS, 'Focus-Net', 'looks closely', architecture)
    box(axes, 0.75, 2.97, 1.0, 1.0, PALE, f'image\n{size} × {size}\n× 3')
    box(axes, *PRIOR, 1.75, 0.85, OVERVIEW, f'context prior\n{architecture.prior}', filled=True)
    colours = dict(blocks1=BASE, blocks2=BASE, blocks3=BASE, blocks4=OVERVIEW, sub_blocks3=FOCUS, sub_blocks4=FOCUS)
    left, right, top = {}, {}, {}  # of the bars, with a space
    for name, (x, y) in PLACES.items():
        half, height = bars(axes, x, y, architecture.stages[name], size, colours[name])
        left[name], right[name], top[name] = (x - half - 0.12, y), (x + half + 0.12, y), (x, y + height / 2 + 0.1)

    arrow(axes, (1.27, 2.97), left['blocks1'])
    arrow(axes, right['blocks1'], left['blocks2'])
    arrow(axes, right['blocks2'], left['blocks3'])
    arrow(axes, (right['blocks3'][0], 3.1), left['blocks4'], bend=-0.25)
    arrow(axes, (right['blocks3'][0], 2.84), left['sub_blocks3'], bend=0.25)
    arrow(axes, right['blocks4'], (PRIOR[0] - 0.92, PRIOR[1]))
    arrow(axes, right['sub_blocks3'], left['sub_blocks4'])
    x, y = top['sub_blocks3']
    arrow(axes, (PRIOR[0] - 0.75, 4.25), (x + 0.6, y), bend=-0.2, colour=OVERVIEW, dashed=True)
    arrow(axes, (PRIOR[0], 4.25), top['sub_blocks4'], colour=OVERVIEW, dashed=True)

    note(axes, 11.36, 3.2, 'guides features\nand kernels of\nevery block', OVERVIEW)
    axes.text(0.25, 5.5, architecture.name, color=INK, fontsize=19, weight='bold', va='center')
    note(axes, 0.25, 4.98, 'A bar is a block. Its height\nshows the size of the map.')
    small, _ = architecture.stages['sub_blocks3'].kernels
    note(
        axes,
        0.25,
        0.8,
        'Base-Net and Overview-Net: large static kernels.\n'
        f'Focus-Net: ContMix. Every position has kernels of its own, {small} × {small} and\n'
        'large, made from its affinities with the context.',
    )
    return figure


def panel(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, name: str, role: str, of: Architecture
) -> None:
    """The ground of a sub-network, from its lower left corner."""
    for face, edge, alpha in ((colour, 'none', 0.08), ('none', colour, 0.6)):
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle='round,pad=0,rounding_size=0.12',
                facecolor=face,
                edgecolor=edge,
                alpha=alpha,
            )
        )
    axes.text(x + 0.14, y + height - 0.2, name, color=colour, fontsize=12.5, weight='bold', va='center')
    millions = f'{of.parameters[name] / 1e6:.1f} M parameters'
    axes.text(x + 0.14, y + height - 0.45, f'{role} · {millions}', color=PALE, fontsize=8.5, va='center')


def bars(axes: Axes, x: float, y: float, stage: Stage, image: int, colour: str) -> tuple[float, float]:
    """The blocks of a stage, around (x, y), and its values below them. Returns half of the width, and the height."""
    room = 1.9 if stage.name == 'sub_blocks3' else 0.95
    pitch = min(0.155, room / stage.blocks)
    # Not in proportion: the sides of the maps at strides 4 and 32 are 8 to 1.
    height = 1.3 * (4 * stage.size[0] / image) ** 0.33
    left = x - pitch * stage.blocks / 2
    for i in range(stage.blocks):
        axes.add_patch(
            FancyBboxPatch(
                (left + (i + 0.17) * pitch, y - height / 2), 0.66 * pitch, height,
                boxstyle='round,pad=0,rounding_size=0.03', facecolor=colour, edgecolor='none',
            )
        )  # fmt: skip
    lines = (
        (stage.name, INK, 'bold'),
        (f'{stage.blocks} blocks, {kernels_of(stage)}', INK, 'normal'),
        (stage.shape, colour, 'bold'),
    )
    below = y - (0.8 if colour == BASE else 0.62)
    for i, (text, ink, weight) in enumerate(lines):
        axes.text(x, below - 0.2 * i, text, color=ink, weight=weight, fontsize=9, ha='center', va='center')
    return x - left, height


def note(axes: Axes, x: float, y: float, text: str, colour: str = PALE) -> None:
    axes.text(x, y, text, color=colour, fontsize=9, va='center', linespacing=1.4)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, filled: bool = False) -> None:
    """A box around (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle='round,pad=0,rounding_size=0.1', linewidth=1.3,
            facecolor=colour if filled else 'white', edgecolor=colour,
        )
    )  # fmt: skip
    weight = 'bold' if filled else 'normal'
    axes.text(
        x,
        y,
        text,
        color='white' if filled else INK,
        weight=weight,
        fontsize=9.5,
        ha='center',
        va='center',
        linespacing=1.35,
    )


def arrow(axes: Axes, start: tuple, end: tuple, bend: float = 0.0, colour: str = PALE, dashed: bool = False) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f'arc3,rad={bend}', arrowstyle='-|>', mutation_scale=13, color=colour,
            linewidth=1.6, linestyle=(0, (4, 2)) if dashed else '-', shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', choices=ARCHITECTURES, default='t', help='default: t')
    parser.add_argument('--size', type=int, default=224, help='height and width of the image (default: 224)')
    parser.add_argument('--out', type=Path, default=OUT, metavar='FILE', help='.svg or .png (default: %(default)s)')
    args = parser.parse_args()
    architecture = read_architecture(args.arch, args.size)
    # The same file in every run. Letters are paths, so that they look the same everywhere.
    metadata = dict(Title=architecture.name, Description=architecture.describe())
    if args.out.suffix == '.svg':
        metadata['Date'] = None
    with plt.rc_context({'svg.hashsalt': architecture.name, 'svg.fonttype': 'path'}):
        draw(architecture).savefig(args.out, facecolor='white', dpi=150, metadata=metadata)
    print(f'{args.out}: {architecture.describe()}')


if __name__ == '__main__':
    main()
