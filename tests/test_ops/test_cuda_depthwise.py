"""The CUDA kernels of depth-wise convolutions, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, SOURCES, T4, build, nan_like, relative_error, run
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
    seed: int = 0


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


def numbers(case: Case, flipped: bool = False) -> tuple[int, ...]:
    sizes = (case.batch, case.channels, *case.size, case.kernel_size, case.dilation)
    return (DTYPES.index(case.dtype), *sizes, case.residual, flipped)


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    """The output, all gradients, and the launches: of the forward and the parameters' gradients, and of the input's."""
    x, grad, weight, bias = operands.x, operands.grad, operands.weight, operands.bias
    settings = dict(folder=folder, shared_memory=case.shared_memory, reversed_threads=reversed_threads)
    arrays = [x, weight, bias, nan_like(x), grad, nan_like(weight), None if bias is None else nan_like(bias)]
    (*_, output, _, grad_weight, grad_bias), launches = run(program, numbers(case), arrays, **settings)
    arrays = [grad, weight, None, nan_like(x), None, None, None]
    (*_, grad_x, _, _, _), of_input = run(program, numbers(case, flipped=True), arrays, **settings)
    return dict(
        output=output, grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias, launches=launches, of_input=of_input
    )


def expected(case: Case, operands: Operands) -> dict[str, Optional[Tensor]]:
    x, weight = (each.double().requires_grad_() for each in (operands.x, operands.weight))
    bias = None if operands.bias is None else operands.bias.double().requires_grad_()
    padding = case.dilation * (case.kernel_size // 2)
    output = F.conv2d(x, weight, bias, padding=padding, dilation=case.dilation, groups=case.channels)
    output = output + x if case.residual else output
    output.backward(operands.grad.double())
    grad_bias = None if bias is None else bias.grad
    return dict(output=output.detach(), grad_x=x.grad, grad_weight=weight.grad, grad_bias=grad_bias)


def sizes_of_sums(case: Case, operands: Operands) -> dict[str, Tensor]:
    """For the errors of sums over positions: the root of the sum of their terms' squares, in float64."""
    x, grad = operands.x.double().square(), operands.grad.double().square()
    padding = case.dilation * (case.kernel_size // 2)
    settings = dict(padding=padding, dilation=case.dilation, groups=case.channels)
    of_weight = torch.nn.grad.conv2d_weight(x, operands.weight.shape, grad, **settings)
    return dict(grad_weight=of_weight.sqrt(), grad_bias=grad.sum((0, 2, 3)).sqrt())


def check(program: Path, case: Case, folder: Path) -> dict:
    operands = Operands(case)
    got = call(program, case, operands, folder)
    of_maps, of_sums = TOLERANCES[case.dtype]
    sizes = sizes_of_sums(case, operands)
    for name, each in expected(case, operands).items():
        if each is not None:
            tolerance = of_sums if name in sizes else of_maps
            assert relative_error(got[name], each, sizes.get(name)) <= tolerance, (name, case)
    launches = [*got['launches'], *got['of_input']]
    assert len(launches) == 4
    assert ['direct' not in launch.kernel for launch in launches] == [case.staged, case.staged, True, case.staged], case
    return got


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
    # What the direct variant takes.
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


@pytest.mark.parametrize('case', [Case(7, (19, 37), 9), Case(3, (11, 9), 5, dilation=2, staged=False)], ids=str)
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


@pytest.mark.parametrize('case', [Case(3, (9, 9), batch=0), Case(3, (9, 9), channels=0)], ids=['images', 'channels'])
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, case):
    got = call(programs['sanitized'], case, Operands(case), tmp_path)
    assert got['launches'] == got['of_input'] == []


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case', [Case(7, (40, 33), 12, batch=2), Case(3, (9, 14), 5, dilation=2, staged=False)], ids=['staged', 'direct']
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    """A launch reads every operand, once by this count, and nothing else."""
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    x, weight, bias, grad = operands.x, operands.weight, operands.bias, operands.grad
    got = call(programs['plain'], case, operands, tmp_path)
    (forward, sums, total), (of_input,) = got['launches'], got['of_input']

    settings = (case.dilation, case.residual)
    stated = operator_costs.cost_of_depthwise(x, weight, bias, *settings, outputs=[x])
    assert (stated.launches, stated.bytes) == (1, forward.bytes_read + bytes_of([x]))
    stated = operator_costs.cost_of_depthwise_backward(grad, x, weight, *settings, (True, False, False), outputs=[x])
    assert (stated.launches, stated.bytes) == (1, of_input.bytes_read + bytes_of([x]))
    wanted, outputs = (False, True, True), [weight, bias]
    stated = operator_costs.cost_of_depthwise_backward(grad, x, weight, *settings, wanted, outputs=outputs)
    written = total.bytes_read + bytes_of(outputs)  # the partial sums, and those of them
    assert (stated.launches, stated.bytes) == (2, sums.bytes_read + total.bytes_read + written)
