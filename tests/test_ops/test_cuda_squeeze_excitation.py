"""The CUDA kernels of squeeze-excitation, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import DTYPES, SOURCES, build, nan_like, relative_error, run, template_arguments
from torch import Tensor

from overlock_mm.ops import _reference
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

# Relative (Frobenius) errors of maps, and of gates and the parameters' gradients.
TOLERANCES = {
    torch.float32: (1e-6, 5e-6),
    torch.float64: (1e-14, 1e-13),
    torch.float16: (1e-3, 5e-6),
    torch.bfloat16: (8e-3, 5e-6),
}
PARAMETERS = ('reduce_weight', 'reduce_bias', 'expand_weight', 'expand_bias')


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('squeeze_excitation', tmp_path_factory.mktemp('squeeze_excitation'), 'scale_and_shift')


@dataclass
class Case:
    batch: int
    positions: int
    channels: int
    hidden: int
    dtype: torch.dtype = torch.float32
    vector: int = 1  # channels that a thread has to have in a map
    other: bool = False
    seed: int = 0


class Operands:
    """A map (B, C, positions, 1) in channels_last whose means are not 0, and parameters in the accumulation type."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        sums = torch.float64 if case.dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shape = (case.batch, case.channels, case.positions, 1)
        x = random(*shape) + 2 * random(case.batch, case.channels, 1, 1)
        maps = x, random(*shape), random(*shape)
        self.x, self.grad, other = (each.to(case.dtype, memory_format=torch.channels_last) for each in maps)
        self.other = other if case.other else None
        self.reduce_weight = (random(case.hidden, case.channels) / case.channels**0.5).to(sums)
        self.expand_weight = (random(case.channels, case.hidden) / case.hidden**0.5).to(sums)
        self.reduce_bias, self.expand_bias = random(case.hidden).to(sums), random(case.channels).to(sums)

    @property
    def parameters(self) -> list[Tensor]:
        return [getattr(self, name) for name in PARAMETERS]


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    x, sums = operands.x, operands.reduce_bias.dtype
    of_channels = torch.full((case.batch, case.channels), torch.nan, dtype=sums)
    of_hidden = torch.full((case.batch, case.hidden), torch.nan, dtype=sums)
    arrays = [x, *operands.parameters, nan_like(x), of_channels, of_channels, of_hidden, operands.grad, nan_like(x)]
    arrays += [of_channels, of_hidden, of_channels, *map(nan_like, operands.parameters)]
    arrays += [None, None] if operands.other is None else [operands.other, nan_like(x)]
    numbers = (DTYPES.index(case.dtype), case.batch, case.positions, case.channels, case.hidden)
    results, launches = run(program, numbers, arrays, folder, reversed_threads=reversed_threads)
    names = ('output', 'gate', 'mean', 'squeezed', 'grad_output', 'grad_x', 'grad_mean', 'grad_squeezed', 'grad_expanded')
    names += (*(f'grad_{name}' for name in PARAMETERS), 'other', 'grad_other')
    return dict(zip(names, results[5:]), launches=launches)


def expected(operands: Operands) -> dict[str, Tensor]:
    x, *parameters = (each.double().requires_grad_() for each in (operands.x, *operands.parameters))
    other = None if operands.other is None else operands.other.double().requires_grad_()
    output, gate = _reference.squeeze_excitation(x, *parameters, other)
    output.backward(operands.grad.double())
    of_parameters = {f'grad_{name}': each.grad for name, each in zip(PARAMETERS, parameters)}
    of_other = {} if other is None else dict(grad_other=other.grad)
    return dict(output=output.detach(), gate=gate.detach(), grad_x=x.grad, **of_other, **of_parameters)


#: The seed of a case that has the same inputs in every run: a gradient is one sum, which can cancel.
ALWAYS = 1

CASES = {
    'float32': Case(2, 77, 40, 16, vector=4),
    'odd': Case(3, 50, 37, 5),
    'one-position': Case(2, 1, 12, 16, vector=4),
    'one-channel': Case(1, 30, 1, 1, seed=ALWAYS),
    'several-strips': Case(2, 1500, 36, 16, vector=4),
    # More channels, and more hidden ones, than a block has threads.
    'many-channels': Case(1, 3, 600, 16, vector=4),
    'many-hidden-channels': Case(1, 2, 5, 520),
    'another-map': Case(2, 77, 40, 16, vector=4, other=True),
    'another-map-odd': Case(3, 50, 37, 5, other=True),
    'another-map-bfloat16': Case(2, 40, 16, 16, dtype=torch.bfloat16, vector=8, other=True),
    'another-map-float64': Case(1, 20, 6, 3, dtype=torch.float64, vector=2, other=True),
    'float64': Case(2, 33, 10, 16, dtype=torch.float64, vector=2),
    'float16': Case(2, 60, 72, 16, dtype=torch.float16, vector=8),
    'bfloat16': Case(1, 70, 64, 16, dtype=torch.bfloat16, vector=8),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    case = CASES[name]
    case.seed = case.seed or secrets.randbits(31)
    operands = Operands(case)
    got = call(programs['sanitized'], case, operands, tmp_path)
    of_maps, of_sums = TOLERANCES[case.dtype]
    for name, each in expected(operands).items():
        tolerance = of_maps if name in ('output', 'grad_x', 'grad_other') else of_sums
        assert relative_error(got[name], each) <= tolerance, (name, case)
    vector = [case.vector]
    arguments = [template_arguments(launch.kernel) for launch in got['launches']]
    assert arguments == [vector, [], vector, vector, [], [], vector], case


def test_the_order_of_threads_does_not_matter(programs, tmp_path):
    case = Case(2, 600, 24, 16, other=True, seed=secrets.randbits(31))
    operands = Operands(case)
    first = call(programs['plain'], case, operands, tmp_path)
    other = call(programs['plain'], case, operands, tmp_path, reversed_threads=True)
    for name in expected(operands):
        assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('case', [Case(0, 4, 8, 4), Case(2, 0, 8, 4)], ids=['images', 'positions'])
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, case):
    assert call(programs['sanitized'], case, Operands(case), tmp_path)['launches'] == []


def test_large_numbers_open_and_close_the_gate(programs, tmp_path):
    """The sigmoid of -1000 is 0 and that of 1000 is 1, with no gradient and no NaN."""
    case = Case(1, 5, 8, 4)
    operands = Operands(case)
    operands.expand_bias.copy_(torch.tensor([1e3, -1e3] * 4))
    got = call(programs['plain'], case, operands, tmp_path)
    assert torch.equal(got['gate'], torch.tensor([[1.0, 0.0] * 4]))
    assert not got['grad_expand_bias'].any()


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case',
    [Case(2, 900, 24, 16), Case(2, 70, 9, 5, dtype=torch.float16), Case(1, 20, 8, 3, other=True)],
    ids=['float32', 'float16', 'another map'],
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    got = call(programs['plain'], case, operands, tmp_path)
    x, parameters = operands.x, operands.parameters
    first, gates, scaled, second, gradients, weights, last = (launch.bytes_read for launch in got['launches'])
    number = operands.reduce_bias.element_size()
    sums = torch.ops.overlock_mm._scale_and_shift_strips(x.shape) * case.batch * case.channels * number

    other = operands.other
    stated = operator_costs.cost_of_squeeze_excitation(x, *parameters, other, outputs=())
    written = sums + bytes_of([got['gate'], got['mean'], got['squeezed'], x])
    assert (stated.launches, stated.bytes) == (3, first + gates + scaled + written)
    kept = got['gate'], got['mean'], got['squeezed']
    stated = operator_costs.cost_of_squeeze_excitation_backward(
        operands.grad, x, operands.reduce_weight, operands.expand_weight, other, *kept, outputs=()
    )
    written = sums + bytes_of([got['grad_mean'], got['grad_squeezed'], got['grad_expanded'], *parameters, x, other])
    assert (stated.launches, stated.bytes) == (4, second + gradients + weights + last + written)
