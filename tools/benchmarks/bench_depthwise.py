"""Whether the depth-wise operators of overlock_mm.ops are ever slower than PyTorch's.

    python tools/benchmarks/bench_depthwise.py --keep-freed-memory --json depthwise.json
    python tools/benchmarks/bench_depthwise.py --what zoo --arch t --dtype bfloat16 --json bfloat16.json

What is measured (--what), on contiguous and on channels_last maps:

    zoo      depth-wise convolutions of the variants: the large kernels of stages 1 to 4, the 3x3 of the blocks, of their
             MLPs and of the fusion. Shapes with the same kernel must differ in size by a factor of --spacing
    sweep    kernels 3, 5, ..., 31 on one map
    dilated  the dilated branches that run beside the large kernels, on that map
    norms    branch_norms of the large kernels at up to 512x512

The implementations are ours and torch: F.conv2d on the same map and, for norms, one F.conv2d and one F.batch_norm with the
statistics of the batch for each branch. A ratio torch / ours below 1 means that ours is slower. kept is what a forward
leaves allocated for its backward, output included and inputs not. The floor is the larger of two times: bytes that must
move at the rate of a large copy, and multiply-adds of taps within the map at the rate of a large matrix product.

All results are checked against PyTorch's on the contiguous map (in float32 for half types): outputs and gradients.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Optional

import harness
import torch
import torch.nn.functional as F
from harness import DTYPES, MODES, Case, Operator, Run
from torch import Tensor
from variants import BRANCHES, CHANNELS, KERNEL_SIZES, MLP_RATIO, SUB_MLP_RATIO, map_size

from overlock_mm.ops import branch_norms, depthwise_conv2d

WHAT = ('zoo', 'sweep', 'dilated', 'norms')
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
TOLERANCES = {'float32': 1e-4, 'float64': 1e-10, 'float16': 4e-3, 'bfloat16': 2e-2}
SWEEP_SHAPE = (64, 128, 128)
SWEEP_KERNELS = range(3, 32, 2)


@dataclass(frozen=True)
class Shape:
    """A convolution, or with kind 'norms' a sum of branches, of maps (C, H, W)."""

    kind: str
    channels: int
    height: int
    width: int
    kernel_size: int
    dilation: int = 1

    @property
    def elements(self) -> int:
        return self.channels * self.height * self.width

    @property
    def kernel(self) -> str:
        return f'{self.kernel_size}x{self.kernel_size}' + (f' dilated {self.dilation}' if self.dilation > 1 else '')

    @property
    def group(self) -> str:
        if self.kind == 'sweep':
            first, last = next(bounds for bounds in ((3, 3), (5, 13), (15, 31)) if self.kernel_size <= bounds[1])
            return f'sweep {first}x{first}' + (f' to {last}x{last}' if last > first else '')
        return 'dilated' if self.kind == 'dilated' else f'{self.kind} {self.kernel}'


def zoo_shapes(kind: str, arch: str, image: tuple[int, int]) -> list[Shape]:
    """The depth-wise convolutions of a variant or, with kind 'norms', its large kernels alone."""
    channels, shapes = CHANNELS[arch], []
    context = channels[3] // 4
    for stage, (count, kernel_size) in enumerate(zip(channels, KERNEL_SIZES), 1):
        size = map_size(image, stage)
        shapes.append(Shape(kind, count, *size, kernel_size))
        if kind != 'norms':
            small = (count, MLP_RATIO * count, *((count + context, SUB_MLP_RATIO * count) if stage >= 3 else ()))
            shapes += [Shape(kind, each, *size, 3) for each in small]
    return shapes


def spaced(shapes: Sequence[Shape], spacing: float) -> list[Shape]:
    """The largest and the smallest of each kernel size, and between them those that are ``spacing`` times smaller each.

    Channels that do not fill vectors are apart from those that do.
    """
    chosen, groups = [], {}
    for shape in sorted(set(shapes), key=lambda shape: (-shape.kernel_size, -shape.elements, astuple(shape))):
        groups.setdefault((shape.kernel_size, shape.channels % 16 == 0), []).append(shape)
    for group in groups.values():
        last = math.inf
        for shape in group:
            if spacing <= 1 or shape.elements * spacing <= last or shape is group[-1]:
                chosen.append(shape)
                last = shape.elements
    return chosen


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    chosen: list[Shape] = []
    if 'zoo' in options.what:
        of_zoo = itertools.product(options.arch, options.size)
        chosen += spaced([each for arch, size in of_zoo for each in zoo_shapes('zoo', arch, size)], options.spacing)
    if 'sweep' in options.what:
        chosen += [Shape('sweep', *SWEEP_SHAPE, kernel_size) for kernel_size in SWEEP_KERNELS]
    if 'dilated' in options.what:
        branches = sorted(set(itertools.chain(*BRANCHES.values())), reverse=True)
        chosen += [Shape('dilated', *SWEEP_SHAPE, k, dilation) for k, dilation in branches if dilation > 1]
    if 'norms' in options.what:
        of_norms = itertools.product(options.arch, (size for size in options.size if math.prod(size) <= 512 * 512))
        chosen += spaced([each for arch, size in of_norms for each in zoo_shapes('norms', arch, size)], options.spacing)
    return chosen


# ----------------------------------------------------------------------------------------------------- implementations


def torch_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def torch_branches(x: Tensor, parameters: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """The sum of the branches, each through a batch norm of its own, one after the other."""
    out: Any = 0
    for weight, norm_weight, norm_bias, dilation in zip(*(parameters[i::3] for i in range(3)), dilations):
        y = torch_conv2d(x, weight, None, dilation)
        out = out + F.batch_norm(y, None, None, norm_weight, norm_bias, training=True)
    return out


def our_branches(x: Tensor, parameters: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    weights, norm_weights, norm_biases = (parameters[i::3] for i in range(3))
    return branch_norms(x, weights, norm_weights, norm_biases, dilations)[0]


def branches_of(shape: Shape) -> tuple[tuple[int, int], ...]:
    return ((shape.kernel_size, 1), *BRANCHES[shape.kernel_size])


def function_of(name: str, shape: Shape) -> Callable[..., Tensor]:
    """A function of the tensors that :func:`make_inputs` makes."""
    if shape.kind == 'norms':
        sum_of = our_branches if name == 'ours' else torch_branches
        dilations = [dilation for _, dilation in branches_of(shape)]
        return lambda x, *parameters: sum_of(x, parameters, dilations)
    convolve = depthwise_conv2d if name == 'ours' else torch_conv2d
    return lambda x, weight, bias: convolve(x, weight, bias, shape.dilation)


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Random arguments, the map first; parameters of norms are float32 beside half maps."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int, dtype: torch.dtype = dtype, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale + mean).to(dtype)

    channels, k = shape.channels, shape.kernel_size
    inputs = [random(batch, channels, shape.height, shape.width)]
    if shape.kind == 'norms':
        exact = torch.promote_types(dtype, torch.float32)
        for size, _ in branches_of(shape):
            inputs.append(random(channels, 1, size, size, scale=1 / size))
            inputs += [random(channels, dtype=exact, mean=1.0, scale=0.1), random(channels, dtype=exact)]
        return inputs
    return [*inputs, random(channels, 1, k, k, scale=1 / k), random(channels)]


def taps_in_map(side: int, kernel_size: int, dilation: int) -> int:
    """Of a row of positions and a row of a kernel, the pairs that meet within the map."""
    return sum(max(0, side - abs(offset) * dilation) for offset in range(-(kernel_size // 2), kernel_size // 2 + 1))


def work(shape: Shape, batch: int, dtype: str, backward: bool) -> dict[str, float]:
    """The least that a convolution takes: taps within the map, each operand read once and each result written once."""
    taps = math.prod(taps_in_map(side, shape.kernel_size, shape.dilation) for side in (shape.height, shape.width))
    multiply_adds = batch * shape.channels * taps
    maps, weights = batch * shape.elements, shape.channels * shape.kernel_size**2
    numbers = 2 * maps + weights + shape.channels
    if backward:
        # Reads the map, the gradient and the kernel; writes the gradients of map, kernel and bias.
        multiply_adds *= 3
        numbers += 3 * maps + 2 * weights + shape.channels
    return {'bytes': numbers * DTYPES[dtype].itemsize, f'multiply-adds {dtype}': multiply_adds}


# --------------------------------------------------------------------------------------------------------------- cases


def case_of(shape: Shape, batch: int, dtype: str, layout: str, mode: str, device: torch.device) -> Case:
    backward = mode == MODES[1]
    # The gradients of a kernel before a norm are small differences of large sums.
    tolerance = TOLERANCES[dtype] * (10 if shape.kind == 'norms' else 1)
    sizes = f'{f"{batch}x" if batch > 1 else ""}{shape.channels}x{shape.height}x{shape.width}'

    def operator(name: str, layout: str, raised: bool = False) -> Operator:
        inputs = [each.to(device) for each in make_inputs(shape, batch, DTYPES[dtype])]
        if raised:
            inputs = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in inputs]
        inputs[0] = inputs[0].contiguous(memory_format=LAYOUTS[layout])
        return Operator(function_of(name, shape), [each.requires_grad_() for each in inputs], backward)

    def build(name: str) -> Run:
        return operator(name, layout).run()

    return Case(
        section=f'{mode}, {dtype}',
        group=f'{shape.group}, {layout}',
        name=f'{shape.kind} {shape.kernel}, {sizes}, {layout}',
        implementations=['ours', 'torch'],
        yardstick='ours',
        build=build,
        expected=lambda: operator('torch', 'contiguous', raised=True).results(),
        tolerances=dict.fromkeys(('output', 'gradient'), tolerance),
        baselines=('torch',),
        work={} if shape.kind == 'norms' else work(shape, batch, dtype, backward),
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    if options.spacing < 1:
        raise ValueError(f'--spacing must be at least 1, got {options.spacing:g}')
    return [
        case_of(shape, options.batch, dtype, layout, mode, options.device)
        for dtype, shape, layout, mode in itertools.product(options.dtype, chosen_shapes(options), LAYOUTS, MODES)
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    what = parser.add_argument_group('what to measure')
    what.add_argument('--what', nargs='+', default=list(WHAT), choices=WHAT, help='see above; default: all')
    what.add_argument('--arch', nargs='+', default=list(CHANNELS), choices=CHANNELS, help='variants; default: all')
    what.add_argument(
        '--size', nargs='+', type=harness.image_size, default=list(harness.SIZES), metavar='HxW',
        help='image sizes, for zoo and norms; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument('--spacing', type=float, default=2, metavar='FACTOR', help='see above; default: 2')
    what.add_argument('--batch', type=harness.positive_int, default=1, metavar='N', help='images; default: 1')
    what.add_argument('--dtype', nargs='+', default=['float32'], choices=DTYPES, help='default: float32')
    parser.set_defaults(seconds=2)
    return parser


def main(arguments: Optional[list[str]] = None) -> int:
    return harness.main(make_parser(), cases_of, arguments)


if __name__ == '__main__':
    sys.exit(main())
