"""The CUDA kernels of depth-wise convolutions, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, SOURCES, T4, Launch, build, nan_like, relative_error, run
from torch import Tensor

from overlock_mm.ops.cuda_kernels import has_cuda_kernels

# Relative (Frobenius) errors of maps and of sums over maps.
TOLERANCES = {
    torch.float32: (1e-6, 2e-6),
    torch.float64: (1e-15, 1e-14),
    torch.float16: (5e-4, 2e-6),
    torch.bfloat16: (4e-3, 2e-6),
}


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('depthwise_conv2d', tmp_path_factory.mktemp('depthwise_conv2d'))


@dataclass
class Case:
    kernel_size: int
    size: tuple[int, int]
    channels: int = 8
    batch: int = 1
    dtype: torch.dtype = torch.float32
    dilation: int = 1
    bias: bool = True
    residual: bool = False
    staged: bool = True  # which of the variants has to run
    shared_memory: int = H200
    wanted: tuple[bool, bool, bool] = (True, True, True)  # gradients: of x, weight, bias
    seed: int = 0

    @property
    def kernels(self) -> list[str]:
        """Those that have to run."""
        of_x, of_weight, _ = self.wanted
        forward, weight = ('forward', 'backward_weight') if self.staged else ('direct_forward', 'direct_backward_weight')
        if of_weight and self.kernel_size == 3 and self.dilation == 1:
            return [forward, 'walk', 'sum_partials']
        return [forward] * (1 + of_x) + [weight, 'sum_partials'] * of_weight


class Operands:
    """Random maps in channels_last, and parameters in the accumulation type."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        accumulator = torch.float64 if case.dtype == torch.float64 else torch.float32

        def random(*shape: int, dtype: torch.dtype = accumulator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = (case.batch, case.channels, *case.size)
        self.x, self.grad = (random(*shape, dtype=case.dtype).to(memory_format=torch.channels_last) for _ in range(2))
        self.weight = random(case.channels, 1, case.kernel_size, case.kernel_size)
        self.bias = random(case.channels) if case.bias else None


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    """The output, the gradients, and the launches."""
    x, grad, weight, bias = operands.x, operands.grad, operands.weight, operands.bias
    sizes = (case.batch, case.channels, *case.size, case.kernel_size, case.dilation)
    numbers = (DTYPES.index(case.dtype), *sizes, case.residual)
    grads = [None if each is None or not want else nan_like(each) for each, want in zip((x, weight, bias), case.wanted)]
    arrays, launches = run(
        program,
        numbers,
        [x, weight, bias, nan_like(x), grad, *grads],
        folder=folder,
        shared_memory=case.shared_memory,
        reversed_threads=reversed_threads,
    )
    *_, output, _, grad_x, grad_weight, grad_bias = arrays
    return dict(output=output, grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias, launches=launches)


def kernels_of(launches: list[Launch]) -> list[str]:
    return [re.search(r'\d(?:depthwise_)?([a-z_]+)_kernelI', launch.kernel)[1] for launch in launches]


def expected(case: Case, operands: Operands) -> dict[str, Optional[Tensor]]:
    x, weight = (each.double().requires_grad_() for each in (operands.x, operands.weight))
    bias = None if operands.bias is None else operands.bias.double().requires_grad_()
    padding = case.dilation * (case.kernel_size // 2)
    output = F.conv2d(x, weight, bias, padding=padding, dilation=case.dilation, groups=case.channels)
    output = output + x if case.residual else output
    output.backward(operands.grad.double())
    names, leaves = ('grad_x', 'grad_weight', 'grad_bias'), (x, weight, bias)
    grads = {name: each.grad if want and each is not None else None for name, each, want in zip(names, leaves, case.wanted)}
    return dict(output=output.detach(), **grads)


def sizes_of_sums(case: Case, operands: Operands) -> dict[str, Tensor]:
    """For the errors of sums over positions: the root of the sum of their terms' squares, in float64."""
    x, grad = operands.x.double().square(), operands.grad.double().square()
    padding = case.dilation * (case.kernel_size // 2)
    settings = dict(padding=padding, dilation=case.dilation, groups=case.channels)
    of_weight = torch.nn.grad.conv2d_weight(x, operands.weight.shape, grad, **settings)
    return dict(grad_weight=of_weight.sqrt(), grad_bias=grad.sum((0, 2, 3)).sqrt())


def check(program: Path, case: Case, folder: Path) -> None:
    operands = Operands(case)
    got = call(program, case, operands, folder)
    of_maps, of_sums = TOLERANCES[case.dtype]
    sizes = sizes_of_sums(case, operands)
    for name, each in expected(case, operands).items():
        assert (got[name] is None) == (each is None), name
        if each is not None:
            tolerance = of_sums if name in sizes else of_maps
            assert relative_error(got[name], each, sizes.get(name)) <= tolerance, (name, case)
    assert kernels_of(got['launches']) == case.kernels, case


CASES = {
    # Every staged size: several tiles in both directions, and channels that do not fill the last block.
    '3': Case(3, (35, 41), 11, residual=True),
    '5': Case(5, (18, 37), 9),
    '7': Case(7, (21, 33), 8, bias=False),
    '9': Case(9, (19, 35), 3),
    '11': Case(11, (17, 33), 8),
    '13': Case(13, (20, 34), 10, batch=2),
    '15': Case(15, (18, 36), 8, bias=False),
    '17': Case(17, (37, 50), 9),
    # Maps smaller than the kernel, of one line, and of one position.
    '17-map-7': Case(17, (7, 7), 4, batch=2),
    '13-line': Case(13, (1, 40), 8),
    '9-column': Case(9, (40, 1), 8),
    '7-position': Case(7, (1, 1), 5, batch=3),
    '3-one-channel': Case(3, (9, 10), 1, residual=True),
    # Types. 16 channels make a block of half types.
    '3-float16': Case(3, (17, 18), 24, dtype=torch.float16, residual=True),
    '13-float16': Case(13, (15, 20), 5, dtype=torch.float16),
    '7-bfloat16': Case(7, (13, 22), 17, dtype=torch.bfloat16),
    '17-bfloat16': Case(17, (20, 33), 16, dtype=torch.bfloat16, bias=False),
    '5-float64': Case(5, (11, 13), 5, dtype=torch.float64, residual=True, staged=False),
    # Gradients of 3x3 kernels in one walk: tiles of several lines and columns, thread blocks for one channel and warps
    # without a tile, more channels than a warp, and maps that are smaller than the kernel.
    '3-plain': Case(3, (33, 19), 6),
    '3-many-tiles': Case(3, (70, 37), 33, batch=2, residual=True, bias=False),
    '3-many-channels': Case(3, (5, 7), 100, batch=3),
    '3-line': Case(3, (1, 19), 8, residual=True),
    '3-column': Case(3, (17, 1), 8, residual=True),
    '3-two-lines': Case(3, (2, 2), 3, batch=2),
    '3-position': Case(3, (1, 1), 40, batch=2, residual=True),
    '3-bfloat16': Case(3, (35, 18), 37, dtype=torch.bfloat16, residual=True),
    '3-float16-plain': Case(3, (9, 8), 32, dtype=torch.float16, bias=False),
    # What the direct variant takes.
    '3-float64': Case(3, (35, 18), 34, dtype=torch.float64, residual=True, staged=False),
    '3-dilation-7': Case(3, (19, 15), 9, dilation=7, bias=False, staged=False),
    '9-dilation-2': Case(9, (21, 18), 4, batch=2, dilation=2, staged=False),
    '1': Case(1, (9, 8), 6, staged=False),
    '19': Case(19, (12, 23), 3, staged=False),
    '3-dilation-2-bfloat16': Case(3, (9, 11), 10, dilation=2, dtype=torch.bfloat16, residual=True, staged=False),
    # Less shared memory: smaller tiles, and none.
    '17-T4': Case(17, (30, 40), 8, shared_memory=T4),
    '17-bfloat16-T4': Case(17, (30, 40), 20, dtype=torch.bfloat16, shared_memory=T4),
    '17-without-shared-memory': Case(17, (9, 12), 8, shared_memory=20000, staged=False),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    CASES[name].seed = secrets.randbits(31)
    check(programs['sanitized'], CASES[name], tmp_path)


def test_equals_pytorch_as_shipped(programs, tmp_path):
    check(programs['plain'], Case(13, (50, 84), 16, seed=secrets.randbits(31)), tmp_path)


GRADIENTS = {
    'x': (True, False, False),
    'weight': (False, True, False),
    'weight-and-bias': (False, True, True),
    'x-and-weight': (True, True, False),
}


@pytest.mark.parametrize('wanted', GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kernel_size', [3, 5])
def test_some_gradients(programs, tmp_path, kernel_size, dtype, wanted):
    staged, seed = dtype != torch.float64, secrets.randbits(31)
    check(
        programs['sanitized'],
        Case(kernel_size, (19, 11), 35, dtype=dtype, residual=True, staged=staged, wanted=wanted, seed=seed),
        tmp_path,
    )


ORDERS = {
    'staged': Case(7, (19, 37), 9),
    'direct': Case(3, (11, 9), 5, dilation=2, staged=False),
    'walk': Case(3, (35, 21), 35, batch=2, residual=True),
}


@pytest.mark.parametrize('case', ORDERS.values(), ids=ORDERS)
def test_the_order_of_threads_does_not_matter(programs, tmp_path, case):
    operands = Operands(case)
    first = call(programs['plain'], case, operands, tmp_path)
    other = call(programs['plain'], case, operands, tmp_path, reversed_threads=True)
    for name in ('output', 'grad_x', 'grad_weight', 'grad_bias'):
        assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('row, column', [(0, 0), (9, 17), (18, 3)])
def test_nan_spreads_as_far_as_the_kernel(programs, tmp_path, row, column):
    case = Case(5, (19, 21), 2, bias=False)
    operands = Operands(case)
    operands.x[0, 1, row, column] = torch.nan
    output = call(programs['plain'], case, operands, tmp_path)['output']
    reached = torch.zeros(case.size, dtype=torch.bool)
    reached[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = True
    assert torch.equal(output[0, 1].isnan(), reached)
    assert output[0, 0].isfinite().all()


@pytest.mark.parametrize('row, column', [(0, 0), (10, 7), (11, 8), (34, 17)])
def test_nan_spreads_as_far_as_the_kernel_in_the_gradients(programs, tmp_path, row, column):
    """At corners of the map and of tiles, in the gradient of the output."""
    case = Case(3, (35, 18), 3, batch=2, residual=True)
    operands = Operands(case)
    operands.grad[1, 2, row, column] = torch.nan
    got = call(programs['plain'], case, operands, tmp_path)
    reached = torch.zeros(operands.x.shape, dtype=torch.bool)
    reached[1, 2, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    assert torch.equal(got['grad_x'].isnan(), reached)
    assert got['grad_weight'][2, 0, 1, 1].isnan() and got['grad_bias'][2].isnan()
    assert got['grad_weight'][:2].isfinite().all() and got['grad_bias'][:2].isfinite().all()


EMPTY = {
    'images': Case(3, (9, 9), batch=0),
    'channels': Case(3, (9, 9), channels=0),
    'lines': Case(3, (0, 9)),
    'columns': Case(7, (9, 0)),
}


@pytest.mark.parametrize('case', EMPTY.values(), ids=EMPTY)
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, case):
    assert call(programs['sanitized'], case, Operands(case), tmp_path)['launches'] == []


COSTS = {
    'staged': Case(7, (40, 33), 12, batch=2),
    'direct': Case(3, (9, 14), 5, dilation=2, staged=False),
    'walk': Case(3, (40, 33), 35, batch=2, residual=True),
    'walk-bfloat16': Case(3, (21, 9), 5, dtype=torch.bfloat16),
    'walk-without-x': Case(3, (40, 33), 35, wanted=(False, True, True)),
    'x': Case(3, (40, 33), 35, wanted=(True, False, False)),
}


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize('case', COSTS.values(), ids=COSTS)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    """A launch reads every operand, once by this count, and nothing else."""
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    x, weight, bias, grad = operands.x, operands.weight, operands.bias, operands.grad
    forward, *backward = call(programs['plain'], case, operands, tmp_path)['launches']

    settings = (case.dilation, case.residual)
    stated = operator_costs.cost_of_depthwise(x, weight, bias, *settings, outputs=[x])
    assert (stated.launches, stated.bytes) == (1, forward.bytes_read + bytes_of([x]))

    outputs = [each for each, want in zip((x, weight, bias), case.wanted) if want]
    stated = operator_costs.cost_of_depthwise_backward(grad, x, weight, *settings, case.wanted, outputs=outputs)
    moved = sum(launch.bytes_read for launch in backward) + bytes_of(outputs)
    if case.wanted[1]:
        moved += backward[-1].bytes_read  # the partial sums are written, and read by the last launch
    assert (stated.launches, stated.bytes) == (len(backward), moved)
