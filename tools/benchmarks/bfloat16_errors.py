"""Errors of the backbone in bfloat16 on the CPU, against float64, beside ConvNeXt-T's.

    python tools/benchmarks/bfloat16_errors.py                  # T, random weights and images, 224x224
    python tools/benchmarks/bfloat16_errors.py --size 512x512 --images 4

Errors are norms of differences over the norm of the float64 result: of the four outputs, and of the gradients of all
parameters as one vector. They are medians over images. bfloat16 is autocast.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from typing import Optional

import bench_backbone
import harness
import torch
import torch.nn as nn
from peers import build_peer
from torch import Tensor

from overlock_mm.inference import optimize
from overlock_mm.models import OverLoCK
from overlock_mm.models.overlock import ARCHITECTURES
from overlock_mm.training import fuse


def infer(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(image))


def differentiate(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The gradients of all parameters as one vector, of fixed gradients of the outputs."""
    outputs = list(model(image))
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    parameters = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)
    given = zip(parameters, found)
    return [torch.cat([(torch.zeros_like(p) if each is None else each).flatten().double() for p, each in given])]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


#: What is measured: a name, a model made of OverLoCK or of its peer, and whether it is trained.
SUBJECTS: tuple[tuple[str, str, Callable, bool], ...] = (
    ('optimized', 'ours', optimize, False),
    ('as it is built', 'ours', copy.deepcopy, False),
    ('in training, fused', 'ours', lambda model: fuse(copy.deepcopy(model)), True),
    ('ConvNeXt-T', 'peer', copy.deepcopy, False),
    ('ConvNeXt-T in training', 'peer', copy.deepcopy, True),
)


def errors(build: Callable, weights: nn.Module, images: list[Tensor], bfloat16: bool, trains: bool) -> list[float]:
    """Of every result, the median over images."""
    exact, model = copy.deepcopy(weights).double().train(trains), build(weights.train(trains))
    function = differentiate if trains else infer
    of_images = []
    for image in images:
        expected = function(exact, image.double())
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            got = function(model, image)
        of_images.append([relative_error(*pair) for pair in zip(got, expected)])
    return [statistics.median(values) for values in zip(*of_images)]


def rows(arch: str, size: tuple[int, int], count: int, seed: int) -> list[list[str]]:
    """A name, the dtype, and the errors of four outputs or, in training, of the gradients."""
    torch.manual_seed(seed)
    weights = dict(ours=OverLoCK(arch, out_type='pyramid_with_overview'), peer=build_peer('convnext-tiny'))
    bench_backbone.randomise(weights['ours'])
    images = [torch.randn(1, 3, *size) for _ in range(count)]
    found = []
    for name, of, build, trains in SUBJECTS:
        for dtype in ('float32', 'bfloat16'):
            values = [f'{each:.1e}' for each in errors(build, weights[of], images, dtype == 'bfloat16', trains)]
            found.append([name, dtype, *([''] * 4 + values if trains else [*values, ''])])
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='t', choices=ARCHITECTURES)
    parser.add_argument('--size', type=harness.image_size, default=(224, 224), metavar='HxW')
    parser.add_argument('--images', type=harness.positive_int, default=3, metavar='N')
    parser.add_argument('--seed', type=int, default=0, help='of weights and images')
    return parser


def main(arguments: Optional[list[str]] = None) -> int:
    options = make_parser().parse_args(arguments)
    print('| | dtype | C1 | C2 | C3 | C4 | gradients |\n|---|---|---|---|---|---|---|')
    for row in rows(options.arch, options.size, options.images, options.seed):
        print(f'| {" | ".join(row)} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
