"""The CUDA kernels of scaled sums, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import DTYPES, SOURCES, TOLERANCES_OF_SCALES, build, nan_like, relative_error, run, template_arguments
from torch import Tensor

from overlock_mm.ops import _reference
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

PARAMETERS = ('scale', 'shift', 'other_scale', 'other_shift')


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('scaled_sum', tmp_path_factory.mktemp('scaled_sum'), 'scale_and_shift')


@dataclass
class Case:
    batch: int
    positions: int
    channels: int
    dtype: torch.dtype = torch.float32
    before: int = 0  # channels of a larger map that stand before those of the input
    after: int = 0
    vector: int = 1  # channels that a thread has to have
    seed: int = 0


class Operands:
    """Maps (B, C, positions, 1) in channels_last, and parameters in the accumulation type."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        sums = torch.float64 if case.dtype == torch.float64 else torch.float32

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def random_map(channels: int) -> Tensor:
            numbers = random(case.batch, channels, case.positions, 1, dtype=case.dtype)
            return numbers.to(memory_format=torch.channels_last)

        self.whole = random_map(case.before + case.channels + case.after)
        self.x = self.whole[:, case.before : case.before + case.channels]
        self.other, self.grad = random_map(case.channels), random_map(case.channels)
        self.parameters = {name: random(case.channels, dtype=sums) for name in PARAMETERS}


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    scale, shift, *of_other = operands.parameters.values()
    arrays = [operands.whole, scale, shift, operands.other, *of_other, nan_like(operands.other), operands.grad]
    arrays += [nan_like(operands.other), nan_like(operands.other), nan_like(torch.stack([scale, scale])), nan_like(shift)]
    numbers = (DTYPES.index(case.dtype), case.batch, case.positions, case.channels, operands.whole.shape[1], case.before)
    results, launches = run(program, numbers, arrays, folder, reversed_threads=reversed_threads)
    names = ('output', 'grad_output', 'grad_x', 'grad_other', 'grad_scales', 'grad_shift')
    return dict(zip(names, results[6:]), launches=launches)


def expected(operands: Operands) -> dict[str, Tensor]:
    x, other = (each.double().detach().requires_grad_() for each in (operands.x, operands.other))
    parameters = {name: each.double().requires_grad_() for name, each in operands.parameters.items()}
    scale, shift, *of_other = parameters.values()
    output = _reference.scaled_sum(x, scale, shift, other, *of_other)
    output.backward(operands.grad.double())
    assert torch.equal(shift.grad, of_other[1].grad)
    grad_scales = torch.stack([scale.grad, of_other[0].grad])
    maps = dict(output=output.detach(), grad_x=x.grad, grad_other=other.grad)
    return {**maps, 'grad_scales': grad_scales, 'grad_shift': shift.grad}


def sizes_of_sums(operands: Operands) -> dict[str, Tensor]:
    """For the errors of sums over positions: the root of the sum of their terms' squares, in float64."""
    x, other, grad = (each.double() for each in (operands.x, operands.other, operands.grad))
    x, other, grad = (terms.square().sum((0, 2, 3)).sqrt() for terms in (x * grad, other * grad, grad))
    return dict(grad_scales=torch.stack([x, other]), grad_shift=grad)


CASES = {
    'float32': Case(2, 77, 40, vector=4),
    'float32-odd': Case(3, 50, 37),
    'one-position': Case(2, 1, 12, vector=4),
    'one-channel': Case(1, 300, 1),
    'several-strips': Case(2, 3000, 36, vector=4),
    'a-slice': Case(2, 130, 24, before=16, after=4, vector=4),
    'a-slice-at-an-odd-channel': Case(2, 30, 8, before=3, after=1),
    'a-slice-of-an-odd-map': Case(2, 30, 8, after=5),
    'float64': Case(2, 33, 10, dtype=torch.float64, vector=2),
    'float16': Case(2, 150, 72, dtype=torch.float16, vector=8),
    'bfloat16-slice': Case(1, 140, 64, dtype=torch.bfloat16, before=128, vector=8),
    'bfloat16-odd': Case(2, 9, 12, dtype=torch.bfloat16),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    case = CASES[name]
    case.seed = secrets.randbits(31)
    operands = Operands(case)
    got = call(programs['sanitized'], case, operands, tmp_path)
    of_maps, of_sums = TOLERANCES_OF_SCALES[case.dtype]
    sizes = sizes_of_sums(operands)
    for name, each in expected(operands).items():
        error = relative_error(got[name], each, sizes.get(name))
        assert error <= (of_sums if name in sizes else of_maps), (name, case)
    assert [template_arguments(launch.kernel) for launch in got['launches']] == [[case.vector]] * 2 + [[]], case


def test_the_order_of_threads_does_not_matter(programs, tmp_path):
    case = Case(2, 1000, 24, seed=secrets.randbits(31))
    operands = Operands(case)
    first = call(programs['plain'], case, operands, tmp_path)
    other = call(programs['plain'], case, operands, tmp_path, reversed_threads=True)
    for name in ('output', 'grad_x', 'grad_other', 'grad_scales', 'grad_shift'):
        assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('case', [Case(0, 4, 8), Case(2, 0, 8)], ids=['images', 'positions'])
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, case):
    assert call(programs['sanitized'], case, Operands(case), tmp_path)['launches'] == []


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize('case', [Case(2, 3000, 24), Case(2, 700, 9, dtype=torch.float16)], ids=['float32', 'float16'])
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    x, grad, other = operands.x, operands.grad, operands.other
    scale, shift, other_scale, other_shift = operands.parameters.values()
    forward, sums, total = call(programs['plain'], case, operands, tmp_path)['launches']
    stated = operator_costs.cost_of_scaled_sum(x, scale, shift, other, other_scale, other_shift, outputs=[x])
    assert (stated.launches, stated.bytes) == (1, forward.bytes_read + bytes_of([x]))
    outputs = [x, other, torch.stack([scale, scale]), shift]
    stated = operator_costs.cost_of_scaled_sum_backward(grad, x, scale, other, other_scale, outputs=outputs)
    written = total.bytes_read + bytes_of(outputs)  # the partial sums, and the results
    assert (stated.launches, stated.bytes) == (2, sums.bytes_read + total.bytes_read + written)
