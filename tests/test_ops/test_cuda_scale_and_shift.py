"""The CUDA kernels of scales and shifts, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest
import torch
from emulated import DTYPES, SOURCES, TOLERANCES_OF_SCALES, build, nan_like, relative_error, run, template_arguments
from torch import Tensor

from overlock_mm.ops import _reference
from overlock_mm.ops.cuda_kernels import has_cuda_kernels


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('scale_and_shift', tmp_path_factory.mktemp('scale_and_shift'))


@dataclass
class Case:
    batch: int
    positions: int
    channels: int
    dtype: torch.dtype = torch.float32
    by_image: bool = False
    shift: bool = True
    other: bool = False
    vector: int = 1  # channels that a thread has to have
    seed: int = 0


class Operands:
    """A map (B, C, positions, 1) in channels_last, and parameters in the accumulation type."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        sums = torch.float64 if case.dtype == torch.float64 else torch.float32

        def random(*shape: int, dtype: torch.dtype = sums) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = (case.batch, case.channels, case.positions, 1)
        self.x, self.grad = (random(*shape, dtype=case.dtype).to(memory_format=torch.channels_last) for _ in range(2))
        self.scale = random(case.batch, case.channels) if case.by_image else random(case.channels)
        self.shift: Optional[Tensor] = random(case.channels) if case.shift else None
        self.other: Optional[Tensor] = None
        if case.other:
            self.other = random(*shape, dtype=case.dtype).to(memory_format=torch.channels_last)


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    x, scale, shift = operands.x, operands.scale, operands.shift
    arrays = [x, scale, shift, operands.other, nan_like(x), operands.grad, nan_like(x), nan_like(scale)]
    arrays.append(None if shift is None else nan_like(shift))
    numbers = (DTYPES.index(case.dtype), case.batch, case.positions, case.channels, case.by_image)
    results, launches = run(program, numbers, arrays, folder, reversed_threads=reversed_threads)
    names = ('output', 'grad_output', 'grad_x', 'grad_scale', 'grad_shift')
    return dict(zip(names, results[4:]), launches=launches)


def expected(operands: Operands) -> dict[str, Tensor]:
    x, scale = (each.double().requires_grad_() for each in (operands.x, operands.scale))
    shift = None if operands.shift is None else operands.shift.double().requires_grad_()
    other = None if operands.other is None else operands.other.double()
    output = _reference.scale_and_shift(x, scale, shift, other)
    output.backward(operands.grad.double())
    results = dict(output=output.detach(), grad_x=x.grad, grad_scale=scale.grad)
    return results if shift is None else {**results, 'grad_shift': shift.grad}


def sizes_of_sums(case: Case, operands: Operands) -> dict[str, Tensor]:
    """For the errors of sums over positions: the root of the sum of their terms' squares, in float64."""
    x, grad = operands.x.double(), operands.grad.double()
    of_scale, of_shift = (terms.square().sum((2, 3)) for terms in (x * grad, grad))
    return dict(grad_scale=(of_scale if case.by_image else of_scale.sum(0)).sqrt(), grad_shift=of_shift.sum(0).sqrt())


CASES = {
    'float32': Case(2, 77, 40, vector=4),
    'float32-odd': Case(3, 50, 37),
    'one-position': Case(2, 1, 12, vector=4),
    'one-channel': Case(1, 300, 1),
    'several-strips': Case(2, 3000, 36, vector=4),
    'by-image': Case(3, 300, 20, by_image=True, shift=False, vector=4),
    'by-image-odd': Case(2, 5, 19, by_image=True, shift=False),
    'without-shift': Case(2, 20, 16, shift=False, vector=4),
    'with-a-sum': Case(2, 90, 24, other=True, vector=4),
    'with-a-sum-odd': Case(2, 30, 7, other=True, shift=False),
    'bfloat16-with-a-sum': Case(1, 70, 16, dtype=torch.bfloat16, other=True, vector=8),
    'float64': Case(2, 33, 10, dtype=torch.float64, vector=2),
    'float16': Case(2, 150, 72, dtype=torch.float16, vector=8),
    'bfloat16': Case(1, 140, 64, dtype=torch.bfloat16, by_image=True, shift=False, vector=8),
    'bfloat16-odd': Case(2, 9, 12, dtype=torch.bfloat16),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    case = CASES[name]
    case.seed = secrets.randbits(31)
    operands = Operands(case)
    got = call(programs['sanitized'], case, operands, tmp_path)
    of_maps, of_sums = TOLERANCES_OF_SCALES[case.dtype]
    sizes = sizes_of_sums(case, operands)
    for name, each in expected(operands).items():
        error = relative_error(got[name], each, sizes.get(name))
        assert error <= (of_sums if name in sizes else of_maps), (name, case)
    assert [template_arguments(launch.kernel) for launch in got['launches']] == [[case.vector]] * 2 + [[]], case


def test_the_order_of_threads_does_not_matter(programs, tmp_path):
    case = Case(2, 1000, 24, seed=secrets.randbits(31))
    operands = Operands(case)
    first = call(programs['plain'], case, operands, tmp_path)
    other = call(programs['plain'], case, operands, tmp_path, reversed_threads=True)
    for name in ('output', 'grad_x', 'grad_scale', 'grad_shift'):
        assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('case', [Case(0, 4, 8), Case(2, 0, 8)], ids=['images', 'positions'])
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, case):
    assert call(programs['sanitized'], case, Operands(case), tmp_path)['launches'] == []


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case',
    [Case(2, 3000, 24), Case(2, 700, 9, dtype=torch.float16, by_image=True, shift=False), Case(2, 40, 8, other=True)],
    ids=['by channel', 'by image', 'with a sum'],
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    x, scale, shift = operands.x, operands.scale, operands.shift
    forward, sums, total = call(programs['plain'], case, operands, tmp_path)['launches']
    stated = operator_costs.cost_of_scale_and_shift(x, scale, shift, operands.other, outputs=[x])
    assert (stated.launches, stated.bytes) == (1, forward.bytes_read + bytes_of([x]))
    outputs = [x, scale] if shift is None else [x, scale, shift]
    stated = operator_costs.cost_of_scale_and_shift_backward(operands.grad, x, scale, case.shift, outputs=outputs)
    written = total.bytes_read + bytes_of(outputs)  # the partial sums, and the results
    assert (stated.launches, stated.bytes) == (2, sums.bytes_read + total.bytes_read + written)
