"""The CUDA kernels of layer norms, run on the host (see emulation/), against PyTorch in float64."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, SOURCES, build, nan_like, relative_error, run, template_arguments
from torch import Tensor

from overlock_mm.ops import _reference, norms
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

# Relative (Frobenius) errors of maps and of sums over positions.
TOLERANCES = {
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-15, 1e-14),
    torch.float16: (5e-4, 1e-6),
    torch.bfloat16: (4e-3, 1e-6),
}
EPS = 1e-6


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return build('layer_norm', tmp_path_factory.mktemp('layer_norm'))


@dataclass
class Case:
    positions: int
    channels: int
    dtype: torch.dtype = torch.float32
    lanes: int = 32  # threads that have to share a position
    shared_memory: int = H200
    other_grad: bool = False
    seed: int = 0


class Operands:
    """A map (positions, C) far from 0, and parameters in the accumulation type."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        self.sums = torch.float64 if case.dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.x = (random(case.positions, case.channels) * 3 + 5).to(case.dtype)
        self.grad, self.other_grad = (random(case.positions, case.channels).to(case.dtype) for _ in range(2))
        if not case.other_grad:
            self.other_grad = None
        self.weight, self.bias = random(case.channels).to(self.sums), random(case.channels).to(self.sums)


def call(program: Path, case: Case, operands: Operands, folder: Path, reversed_threads: bool = False) -> dict:
    x, weight = operands.x, operands.weight
    statistics = [torch.full((case.positions,), torch.nan, dtype=operands.sums) for _ in range(2)]
    arrays = [x, weight, operands.bias, torch.tensor([EPS], dtype=torch.float64), nan_like(x), *statistics]
    arrays += [operands.grad, operands.other_grad, nan_like(x), nan_like(weight), nan_like(weight)]
    numbers = (DTYPES.index(case.dtype), case.positions, case.channels)
    results, launches = run(program, numbers, arrays, folder, case.shared_memory, reversed_threads)
    names = ('output', 'mean', 'rstd', 'grad_output', 'other_grad', 'grad_x', 'grad_weight', 'grad_bias')
    return dict(zip(names, results[4:]), launches=launches)


def expected(case: Case, operands: Operands) -> dict[str, Tensor]:
    x, weight, bias = (each.double().requires_grad_() for each in (operands.x, operands.weight, operands.bias))
    output = F.layer_norm(x, (case.channels,), weight, bias, EPS)
    output.backward(operands.grad.double())
    numbers = x.detach()
    return dict(
        output=output.detach(),
        mean=numbers.mean(1),
        rstd=(numbers.var(1, correction=0) + EPS).rsqrt(),
        grad_x=x.grad if operands.other_grad is None else x.grad + operands.other_grad.double(),
        grad_weight=weight.grad,
        grad_bias=bias.grad,
    )


CASES = {
    # Lanes, and channels that do not fill them.
    '8-lanes': Case(37, 30, lanes=8),
    '8-lanes-vectors': Case(70, 32, lanes=8),
    '16-lanes': Case(21, 64, lanes=16),
    '32-lanes': Case(9, 257),
    'many-channels': Case(13, 640),
    'one-position': Case(1, 320),
    'few-channels': Case(300, 5, lanes=8),
    # Several positions of a group, and several partial sums.
    'many-positions': Case(5000, 24, lanes=8),
    # A gradient that is added.
    'with-a-sum': Case(45, 48, lanes=16, other_grad=True),
    'bfloat16-odd-with-a-sum': Case(12, 37, dtype=torch.bfloat16, lanes=8, other_grad=True),
    # Types: vectors of 2 and of 8.
    'float64': Case(19, 66, dtype=torch.float64),
    'float64-odd': Case(5, 15, dtype=torch.float64, lanes=8),
    'float16': Case(33, 64, dtype=torch.float16, lanes=8),
    'float16-odd': Case(10, 251, dtype=torch.float16),
    'bfloat16': Case(17, 320, dtype=torch.bfloat16),
    # Less shared memory: fewer threads.
    'little-shared-memory': Case(40, 640, shared_memory=20000),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    case = CASES[name]
    case.seed = secrets.randbits(31)
    operands = Operands(case)
    got = call(programs['sanitized'], case, operands, tmp_path)
    of_maps, of_sums = TOLERANCES[case.dtype]
    for name, each in expected(case, operands).items():
        tolerance = of_maps if name in ('output', 'grad_x') else of_sums
        assert relative_error(got[name], each) <= tolerance, (name, case)
    lanes = [template_arguments(launch.kernel)[0] for launch in got['launches'][:2]]
    assert lanes == [case.lanes] * 2, case


def test_the_order_of_threads_does_not_matter(programs, tmp_path):
    case = Case(3000, 40, seed=secrets.randbits(31))
    operands = Operands(case)
    first = call(programs['plain'], case, operands, tmp_path)
    other = call(programs['plain'], case, operands, tmp_path, reversed_threads=True)
    for name in ('output', 'mean', 'rstd', 'grad_x', 'grad_weight', 'grad_bias'):
        assert torch.equal(first[name], other[name]), name


def test_numbers_far_from_zero_keep_their_variance(programs, tmp_path):
    """A sum of squares less the square of the sum would have none in float32."""
    case = Case(50, 64)
    operands = Operands(case)
    operands.x += 3e4
    got = call(programs['plain'], case, operands, tmp_path)
    assert relative_error(got['rstd'], expected(case, operands)['rstd']) < 1e-3


def test_nan_stays_at_its_position(programs, tmp_path):
    case = Case(20, 33)
    operands = Operands(case)
    operands.x[7, 3] = torch.nan
    output = call(programs['plain'], case, operands, tmp_path)['output']
    assert output[7].isnan().all()
    assert output.isnan().sum() == 33


def test_nothing_is_launched_without_positions(programs, tmp_path):
    case = Case(0, 8)
    assert call(programs['sanitized'], case, Operands(case), tmp_path)['launches'] == []


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case',
    [Case(3000, 24), Case(21, 65, dtype=torch.bfloat16), Case(40, 16, other_grad=True)],
    ids=['float32', 'bfloat16', 'with a sum'],
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    operands = Operands(case)
    got = call(programs['plain'], case, operands, tmp_path)
    forward, sums, total = got['launches']
    x, grad = (each.t().reshape(1, case.channels, 1, case.positions) for each in (operands.x, operands.grad))
    weight, bias, statistics = operands.weight, operands.bias, [got['mean'], got['rstd']]
    stated = operator_costs.cost_of_layer_norm(x, weight, bias, EPS, outputs=[x, *statistics])
    assert (stated.launches, stated.bytes) == (1, forward.bytes_read + bytes_of([x, *statistics]))
    other_grad = None if operands.other_grad is None else x
    stated = operator_costs.cost_of_layer_norm_backward(grad, x, weight, *statistics, other_grad, outputs=[x, weight, bias])
    written = bytes_of([x]) + total.bytes_read + bytes_of([weight, bias])  # the partial sums, and those of them
    assert (stated.launches, stated.bytes) == (2, sums.bytes_read + total.bytes_read + written)


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
def test_gradients_of_a_branch_and_its_shortcut():
    """How autograd puts the operators together, with PyTorch's in the places of the kernels."""

    def forward(x, weight, bias, eps):
        out, mean, rstd = torch.native_layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)
        return out.permute(0, 3, 1, 2), mean.squeeze(3), rstd.squeeze(3)

    def backward(grad_output, x, weight, mean, rstd, other_grad):
        rows = grad_output.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        grad_x, *others = torch.ops.aten.native_layer_norm_backward(
            *rows, weight.shape, mean.unsqueeze(3), rstd.unsqueeze(3), weight, weight, [True] * 3
        )
        return grad_x.permute(0, 3, 1, 2) + other_grad, *others

    library = torch.library.Library('overlock_mm', 'IMPL')
    library.impl('_layer_norm', forward, 'CPU')
    library.impl('_layer_norm_backward', backward, 'CPU')
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 7, 3, 5), (7,), (7,))
    )

    def gradients(normed, shortcut):
        return torch.autograd.grad((normed.sin() * shortcut).sum() + shortcut.exp().sum(), (x, weight, bias))

    got = gradients(*norms.norm_and_input(x, weight, bias, EPS))
    expected = gradients(_reference.layer_norm(x, weight, bias, EPS), x)
    for each, other in zip(got, expected):
        assert relative_error(each, other) < 1e-14
    library._destroy()
