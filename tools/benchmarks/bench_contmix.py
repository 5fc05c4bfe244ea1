"""Time and memory of the compiled ContMix operator, beside the computation that it replaces.

    python tools/benchmarks/bench_contmix.py --size 800x1344 --batch 1 2 --json contmix.json
    python tools/benchmarks/bench_contmix.py --check           # small shapes in all dtypes, checked and not timed

Shapes are those of the network: ContMix of stages 3 and 4 of the variants. The implementations:

    ours        the compiled operator, torch.ops.overlock_mm.contmix
    published   the unfused computation of the published code in eager PyTorch, one kernel slot at a time
    reference   overlock_mm.ops.contmix_reference, which runs where there is no compiled operator
    compiled    torch.compile of the reference; compiling takes up to a minute a case
    natten      the published computation with natten's na2d_av (natten 0.17.5 or older)

All are checked against the reference: outputs and gradients. kept is what a forward leaves allocated for its backward,
output included and inputs not. The floor is the larger of two times: bytes that must move at the rate of a large copy, and
arithmetic at the rates of a large matrix product (on a CPU, in float32 for half types) and, on a CPU, of torch.exp.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import harness
import torch
import variants
from harness import DTYPES, MODES, Case, Operator, Run, Skipped
from published import contmix_natten, contmix_published
from torch import Tensor

from overlock_mm.ops import _library, contmix_reference

IMPLEMENTATIONS = ('ours', 'published', 'reference', 'compiled', 'natten')
DEFAULTS = ('ours', 'published', 'reference')
TOLERANCES = {'float32': 1e-4, 'float64': 1e-10, 'float16': 2e-2, 'bfloat16': 2e-2}


@dataclass(frozen=True)
class Shape:
    """ContMix of one image."""

    channels: int
    num_groups: int
    kernel_size: int
    height: int
    width: int
    query_channels: int

    @property
    def slots(self) -> int:
        return variants.SMALL_KERNEL_SIZE**2 + self.kernel_size**2

    def __str__(self) -> str:
        sizes = f'{variants.SMALL_KERNEL_SIZE} and {self.kernel_size}'
        return f'{self.channels}x{self.height}x{self.width}, {self.num_groups} groups, kernels {sizes}'


#: With borders, several tiles, and odd numbers of channels; small enough for compute-sanitizer.
SMALL_SHAPES = (Shape(64, 2, 13, 14, 19, query_channels=32), Shape(30, 3, 7, 9, 8, query_channels=9))


def shape_of(arch: str, stage: int, image: tuple[int, int]) -> Shape:
    """ContMix of a stage, 3 or 4.

    Raises:
        ValueError: the map is smaller than the kernel. The network enlarges such maps.
    """
    channels, kernel_size = variants.CHANNELS[arch][stage - 1], variants.KERNEL_SIZES[stage - 1]
    height, width = variants.map_size(image, stage)
    if min(height, width) < kernel_size:
        raise ValueError(f'--size: the kernel {kernel_size} of stage {stage} needs a larger map than {height}x{width}')
    return Shape(channels, variants.NUM_GROUPS[arch][stage - 3], kernel_size, height, width, channels // 2)


def work(shape: Shape, batch: int, dtype: str, backward: bool) -> dict[str, float]:
    """The least that a call takes, each operand read once and each result written once (docs/contmix.md).

    With W_d folded into the keys (S² Cq multiply-adds for a slot and an image), the forward takes for each position, group
    and slot Cq/G multiply-adds for the logit, C/2/G for the sum, and one exponential. The backward computes logits and
    exponentials again. It takes C/2/G for the gradients of the weights and of the values each, Cq/G for those of the query
    and of the keys each, and the folding twice. Between them lie the output and two float32 sums a position and group.
    """
    itemsize = DTYPES[dtype].itemsize
    parameter_itemsize = max(4, itemsize)  # float32 parameters beside half maps, as in training
    positions = batch * shape.height * shape.width
    rows = positions * shape.num_groups * shape.slots
    of_query, of_value = shape.query_channels // shape.num_groups, shape.channels // 2 // shape.num_groups
    tokens = variants.CONTEXT_SIZE**2
    fold = batch * shape.slots * tokens * shape.query_channels

    value, query = positions * shape.channels * itemsize, positions * shape.query_channels * itemsize
    rpb = sum((2 * size - 1) ** 2 for size in (variants.SMALL_KERNEL_SIZE, shape.kernel_size)) * shape.num_groups
    parameters = (shape.slots * (tokens + 1) + rpb) * parameter_itemsize
    small = batch * shape.query_channels * tokens * itemsize + parameters  # the key too
    sums = 2 * positions * shape.num_groups * parameter_itemsize
    multiply_adds, exponentials, moved = rows * (of_query + of_value) + fold, rows, 2 * value + query + small
    if backward:
        multiply_adds += rows * (3 * of_query + 2 * of_value) + 2 * fold
        exponentials *= 2
        # Reads value, query, output and its gradient; writes the gradients of value and query.
        moved += 4 * value + 2 * query + 2 * small + 2 * sums
    return {'bytes': moved, f'multiply-adds {dtype}': multiply_adds, 'exponentials': exponentials}


def make_inputs(shape: Shape, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Random tensors in the order of the operator's arguments. Parameters are float32 beside half maps."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)

    def random(*sizes: int, scale: float = 1.0, dtype: torch.dtype = exact) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(dtype)

    ks, kl, tokens = variants.SMALL_KERNEL_SIZE, shape.kernel_size, variants.CONTEXT_SIZE
    # Logits of standard deviation about 1: kernels that are neither flat nor a single slot.
    query_scale = (shape.query_channels // shape.num_groups) ** -0.5
    return [
        random(batch, shape.channels, shape.height, shape.width, dtype=dtype),
        random(batch, shape.query_channels, shape.height, shape.width, scale=query_scale, dtype=dtype),
        random(batch, shape.query_channels, tokens, tokens, dtype=dtype),
        random(shape.slots, tokens**2, scale=1 / tokens),  # W_d and its bias
        random(shape.slots, scale=0.1),
        random(shape.num_groups, 2 * ks - 1, 2 * ks - 1, scale=0.1),  # the position biases of both kernels
        random(shape.num_groups, 2 * kl - 1, 2 * kl - 1, scale=0.1),
    ]


def function_of(name: str, device: torch.device) -> Callable[..., Tensor]:
    """The function of that name.

    Raises:
        Skipped: it is not available.
    """
    if name == 'ours':
        if _library.missing:
            raise Skipped(_library.missing)
        if device.type == 'cuda' and not _library.build_info['cuda']:
            raise Skipped('overlock_mm was built without CUDA')
        return torch.ops.overlock_mm.contmix
    if name == 'natten':
        try:
            from natten.functional import na2d_av  # noqa: F401
        except ImportError:
            try:
                raise Skipped(f'natten {importlib.metadata.version("natten")} has no na2d_av') from None
            except importlib.metadata.PackageNotFoundError:
                raise Skipped('natten is not installed') from None
        return contmix_natten
    if name == 'compiled':
        torch._dynamo.reset()  # compiled for one shape at a time: earlier ones must not count as recompilations
        return torch.compile(contmix_reference, dynamic=False)
    return dict(published=contmix_published, reference=contmix_reference)[name]


def case_of(
    shape: Shape, batch: int, dtype: str, mode: str, group: str, title: str, names: list[str], device: torch.device
) -> Case:
    backward = mode == MODES[1]
    sizes = dict(
        num_groups=shape.num_groups, small_kernel_size=variants.SMALL_KERNEL_SIZE, large_kernel_size=shape.kernel_size
    )
    inputs = make_inputs(shape, batch, DTYPES[dtype])

    def operator(function: Callable[..., Tensor], where: torch.device, dtype: Optional[torch.dtype] = None) -> Operator:
        tensors = [each.to(where, dtype).requires_grad_() for each in inputs]
        return Operator(lambda *tensors: function(*tensors, **sizes), tensors, backward)

    def build(name: str) -> Run:
        function = function_of(name, device)
        if name in ('published', 'reference'):
            harness.require_memory(operator(function, torch.device('meta')).forward, device)
        return operator(function, device).run()

    def expected() -> dict[str, list[Tensor]]:
        """Of the same numbers in float32 or, for a small shape, in float64 on the CPU."""
        if shape in SMALL_SHAPES:
            return operator(contmix_reference, torch.device('cpu'), torch.float64).results()
        harness.require_memory(operator(contmix_reference, torch.device('meta')).forward, device)
        return operator(contmix_reference, device, torch.promote_types(DTYPES[dtype], torch.float32)).results()

    return Case(
        section=f'{mode}, {dtype}',
        group=group,
        name=title,
        implementations=names,
        yardstick='ours',
        build=build,
        expected=expected,
        tolerances=dict.fromkeys(('output', 'gradient'), TOLERANCES[dtype]),
        baselines=IMPLEMENTATIONS[1:],
        work=work(shape, batch, dtype, backward),
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All cases. A shape that several variants have comes once."""
    if options.check:
        options.rounds = 0
        return [
            case_of(shape, 2, dtype, MODES[1], str(shape), str(shape), ['ours'], options.device)
            for shape, dtype in itertools.product(SMALL_SHAPES, ('float32', 'bfloat16', 'float16'))
        ]
    cases = []
    for size, batch, dtype in itertools.product(options.size, options.batch, options.dtype):
        found: dict[tuple[int, Shape], list[str]] = {}
        for arch, stage in itertools.product(options.arch, options.stage):
            found.setdefault((stage, shape_of(arch, stage, size)), []).append(arch)
        for ((stage, shape), archs), mode in itertools.product(found.items(), MODES):
            where = f'{size[0]}x{size[1]}, batch {batch}'
            title = f'{",".join(archs)} stage {stage}, {where}'
            group = f'stage {stage}, {where}'
            cases.append(case_of(shape, batch, dtype, mode, group, title, options.implementations, options.device))
    return cases


def make_parser() -> argparse.ArgumentParser:
    parser = harness.make_parser(__doc__)
    what = parser.add_argument_group('what to measure')
    what.add_argument(
        '--arch', nargs='+', default=list(variants.VARIANTS), choices=variants.VARIANTS, help='variants; default: all'
    )
    what.add_argument('--stage', nargs='+', type=int, default=[3, 4], choices=[3, 4], help='default: 3 4')
    what.add_argument(
        '--size', nargs='+', type=harness.image_size, default=list(harness.SIZES), metavar='HxW',
        help='image sizes; default: 224x224 512x512 800x1344',
    )  # fmt: skip
    what.add_argument('--batch', nargs='+', type=harness.positive_int, default=[1], metavar='N', help='images; default: 1')
    what.add_argument('--dtype', nargs='+', default=['float32'], choices=DTYPES, help='default: float32')
    what.add_argument(
        '--implementations', nargs='+', default=list(DEFAULTS), choices=IMPLEMENTATIONS, metavar='NAME',
        help=f'see above; default: {", ".join(DEFAULTS)}',
    )  # fmt: skip
    what.add_argument('--check', action='store_true', help='check small shapes in all dtypes, and time nothing')
    return parser


def main(arguments: Optional[list[str]] = None) -> int:
    return harness.main(make_parser(), cases_of, arguments)


if __name__ == '__main__':
    sys.exit(main())
