"""What OverLoCK asks of its ContMix operator, and the least that answering takes: shapes, operations, bytes.

As a script it prints the shapes at the usual inputs as JSON. contmix_shapes.json, made so, stands in for the network where
mmengine and mmcv, which the network needs, are not installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VARIANTS = ('xt', 't', 's', 'b')
INPUTS = ((224, 224), (512, 512), (800, 1344))
RECORD = Path(__file__).with_suffix('.json')


@dataclass(frozen=True)
class Shape:
    """ContMix of one stage at one input size, for one image."""

    arch: str
    input: tuple[int, int]  #: height and width of the image
    stage: int
    blocks: int  #: calls in the network
    channels: int  #: C
    query_channels: int  #: Cq
    num_groups: int  #: G
    small_kernel_size: int  #: ks
    large_kernel_size: int  #: kl
    context_size: int  #: S
    height: int  #: of the map
    width: int

    @property
    def slots(self) -> int:
        return self.small_kernel_size**2 + self.large_kernel_size**2

    @property
    def operator(self) -> tuple[int, ...]:
        """What the operator sees: two stages with the same are one case to measure."""
        return (
            self.channels, self.query_channels, self.num_groups, self.small_kernel_size, self.large_kernel_size,
            self.context_size, self.height, self.width,
        )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The least that a call takes, each operand read once and each result written once."""

    multiply_adds: int
    exponentials: int
    bytes: int


def work(shape: Shape, batch: int, itemsize: int, parameter_itemsize: int = 4) -> dict[str, Work]:
    """Count forward, and forward with backward.

    With W_d folded into the keys (``S² Cq`` multiply-adds a slot and image), the forward takes for every position, group
    and slot ``Cq/G`` multiply-adds for the logit, ``C/2/G`` for the sum, and one exponential. The backward makes the logits
    and the exponentials again, and has ``C/2/G`` for the weights' gradient and for the values', ``Cq/G`` for the query's
    and for the keys'; then twice the folding. Between them lie the output and two float32 sums a position and group.

    Args:
        shape: of one image.
        batch: images.
        itemsize: bytes of a number of value, query, key and output.
        parameter_itemsize: of a number of W_d and the biases; that of the sums too.
    """
    positions = batch * shape.height * shape.width
    rows = positions * shape.num_groups * shape.slots
    of_query, of_value = shape.query_channels // shape.num_groups, shape.channels // 2 // shape.num_groups
    tokens = shape.context_size**2
    fold = batch * shape.slots * tokens * shape.query_channels

    value, query = positions * shape.channels * itemsize, positions * shape.query_channels * itemsize
    rpb = sum((2 * size - 1) ** 2 for size in (shape.small_kernel_size, shape.large_kernel_size)) * shape.num_groups
    parameters = (shape.slots * (tokens + 1) + rpb) * parameter_itemsize
    small = batch * shape.query_channels * tokens * itemsize + parameters  # key too
    sums = 2 * positions * shape.num_groups * parameter_itemsize
    forward = Work(rows * (of_query + of_value) + fold, rows, 2 * value + query + small)
    # The backward reads value, query, output and its gradient, and writes the gradients of value and query.
    both = Work(
        forward.multiply_adds + rows * (3 * of_query + 2 * of_value) + 2 * fold,
        2 * rows,
        forward.bytes + 4 * value + 2 * query + 2 * small + 2 * sums,
    )
    return {'forward': forward, 'forward_backward': both}


def network_shapes(arch: str, inputs: Sequence[tuple[int, int]]) -> list[Shape]:
    """Run the network on images without data, and see what each stage gives the operator.

    Needs mmengine and mmcv, as the network does.
    """
    import torch

    from overlock_mm.models import OverLoCK, blocks
    from overlock_mm.models.overlock import resolve_architecture

    settings = resolve_architecture(arch)
    depths = settings['sub_depths']
    # All blocks of a stage are alike: one of each will do.
    network = OverLoCK({**settings, 'depths': (1, 1, 1, 1), 'sub_depths': (1, 1)}).eval().to('meta')
    calls = []

    def record(value, query, key, *parameters, **sizes):
        calls.append((value, query, key, sizes))
        return torch.empty_like(value)

    shapes = []
    operator, blocks.contmix = blocks.contmix, record
    try:
        for size in inputs:
            calls.clear()
            with torch.no_grad():
                network(torch.empty(1, 3, *size, device='meta'))
            for stage, blocks_of_stage, (value, query, key, sizes) in zip((3, 4), depths, calls):
                shapes.append(
                    Shape(
                        arch=arch,
                        input=tuple(size),
                        stage=stage,
                        blocks=blocks_of_stage,
                        channels=value.shape[1],
                        query_channels=query.shape[1],
                        context_size=key.shape[2],
                        height=value.shape[2],
                        width=value.shape[3],
                        **sizes,
                    )
                )
    finally:
        blocks.contmix = operator
    return shapes


def recorded_shapes(arch: str, inputs: Sequence[tuple[int, int]]) -> list[Shape]:
    """The same from contmix_shapes.json.

    Raises:
        LookupError: it has no such input size.
    """
    shapes = [Shape(**{**each, 'input': tuple(each['input'])}) for each in json.loads(RECORD.read_text())]
    chosen = []
    for size in inputs:
        found = [shape for shape in shapes if shape.arch == arch and shape.input == tuple(size)]
        if not found:
            raise LookupError(f'{RECORD.name} has no input {size[0]}x{size[1]} of {arch!r}, and the network needs mmcv')
        chosen += found
    return chosen


def shapes_of(arch: str, inputs: Sequence[tuple[int, int]]) -> tuple[list[Shape], str]:
    """Shapes, and where they are from: 'network', or 'record' where the network does not import."""
    try:
        return network_shapes(arch, inputs), 'network'
    except ImportError:
        return recorded_shapes(arch, inputs), 'record'


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    shapes = [asdict(shape) for arch in VARIANTS for shape in network_shapes(arch, INPUTS)]
    print('[\n' + ',\n'.join(json.dumps(each) for each in shapes) + '\n]')


if __name__ == '__main__':
    main()
