"""The CUDA kernels of response norms, with and without the layers before them, run on the host thread by thread."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, SOURCES, Launch, build, nan_like, relative_error, run
from torch import Tensor

from overlock_mm.ops.cuda_kernels import has_cuda_kernels

EPS = 1e-6
#: Relative (Frobenius) errors.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 6e-3}
OPERATORS = {'response_norm': (), 'residual_depthwise_norm': ('response_norm',)}


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    """By operator and build."""
    return {name: build(name, tmp_path_factory.mktemp(name), *others) for name, others in OPERATORS.items()}


@dataclass
class Case:
    """A call of an operator, whose inputs are drawn from `seed`."""

    operator: str
    size: tuple[int, int, int, int]  # batch, channels, height, width
    dtype: torch.dtype = torch.float32
    bias: bool = True
    gelu: bool = True
    inplace: bool = False
    seed: int = field(default_factory=lambda: secrets.randbits(31))

    @property
    def has_backward(self) -> bool:
        return self.operator == 'response_norm' or (self.gelu and not self.inplace)

    def inputs(self) -> dict[str, Optional[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        batch, channels, *_ = self.size
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32

        def random(*shape: int, dtype: torch.dtype = exact) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def random_map() -> Tensor:
            return random(*self.size, dtype=self.dtype).contiguous(memory_format=torch.channels_last)

        inputs = dict(x=random_map())
        if self.operator != 'response_norm':
            inputs.update(weight=random(channels, 1, 3, 3) / 3, bias=random(channels) if self.bias else None)
        return dict(**inputs, gamma=random(channels), beta=random(channels), grad_output=random_map())

    def expected(self, inputs: dict[str, Optional[Tensor]]) -> dict[str, Tensor]:
        """Output, response, scale and gradients in float64."""
        leaves = {name: x.double().requires_grad_() for name, x in inputs.items() if x is not None}
        u = leaves['x']
        if self.operator != 'response_norm':
            v = F.gelu(u) if self.gelu else u
            u = v + F.conv2d(v, leaves['weight'], leaves.get('bias'), padding=1, groups=v.shape[1])
        response = u.square().sum((2, 3)).sqrt()
        scale = leaves['gamma'] * response / (response.mean(1, keepdim=True) + EPS) + 1
        output = u * scale[..., None, None] + leaves['beta'].view(-1, 1, 1)
        output.backward(leaves.pop('grad_output'))
        gradients = {f'grad_{name}': leaf.grad for name, leaf in leaves.items()}
        return dict(output=output.detach(), response=response.detach(), scale=scale.detach(), **gradients)

    def run(self, program: Path, inputs: dict, folder: Path, reversed_threads: bool = False) -> tuple[dict, dict]:
        """What the kernels write, and their launches: forward, again from the scale of the forward, and backward."""
        numbers = [DTYPES.index(self.dtype), *self.size]
        if self.operator == 'response_norm':
            numbers = [*numbers[:3], self.size[2] * self.size[3]]
        else:
            numbers += [self.gelu, self.inplace]
        tensors = [inputs[name] for name in inputs if name != 'grad_output']
        of_map, of_images = nan_like(inputs['x']), torch.full(self.size[:2], torch.nan, dtype=inputs['gamma'].dtype)
        options = dict(folder=folder, shared_memory=H200, reversed_threads=reversed_threads)
        arrays, forward = run(program, [*numbers, False], [*tensors, of_map, of_images, of_images], **options)
        output, response, scale = arrays[-3:]
        written = dict(output=output, response=response, scale=scale)
        launches = dict(forward=forward)
        if self.has_backward:
            arrays, launches['again'] = run(program, [*numbers, True], [*tensors, of_map, of_images, scale], **options)
            written['output_again'] = arrays[-3]
            arguments = [*tensors, of_map, response, of_images, inputs['grad_output'], of_map]
            norm = nan_like(inputs['gamma'])
            if self.operator == 'response_norm':
                arguments += [norm, norm]
            else:
                arguments += [nan_like(inputs['weight']), norm, norm, norm]
            arrays, launches['backward'] = run(program, [*numbers, False], arguments, **options)
            gradients = arrays[-3 if self.operator == 'response_norm' else -5 :]
            names = [f'grad_{name}' for name in inputs if name != 'grad_output']
            written.update(zip(names, gradients))
        return written, launches


def check(programs: dict, case: Case, folder: Path, kind: str = 'sanitized') -> dict[str, list[Launch]]:
    inputs = case.inputs()
    written, launches = case.run(programs[case.operator][kind], inputs, folder)
    if case.has_backward:
        assert torch.equal(written['output_again'], written['output']), case
    for name, expected in case.expected(inputs).items():
        if name not in written:
            assert not case.has_backward, name
            continue
        # Parameters and sums are never rounded to half.
        own = case.dtype if expected.ndim == 4 and name != 'grad_weight' else inputs['gamma'].dtype
        assert relative_error(written[name], expected) <= TOLERANCES[own], (name, case)
    return launches


NORM, FUSED = 'response_norm', 'residual_depthwise_norm'
SIZES = {
    'one position': (1, 3, 1, 1),
    'one line': (2, 5, 1, 19),
    'one column': (1, 33, 17, 1),
    'two tiles': (2, 32, 9, 9),
    'many tiles': (1, 40, 70, 37),
    'several strips': (1, 9, 64, 33),
    'many channels': (3, 1100, 3, 2),
    'as stage 4': (1, 64, 25, 42),
}


@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('operator', OPERATORS)
def test_sizes(programs, tmp_path, operator, size):
    check(programs, Case(operator, size), tmp_path)


@pytest.mark.parametrize('dtype', DTYPES[1:], ids=str)
@pytest.mark.parametrize('operator', OPERATORS)
def test_dtypes(programs, tmp_path, operator, dtype):
    check(programs, Case(operator, (2, 37, 21, 19), dtype), tmp_path)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('settings', [dict(gelu=False), dict(gelu=False, inplace=True), dict(bias=False)], ids=str)
def test_settings(programs, tmp_path, settings, dtype):
    check(programs, Case(FUSED, (2, 35, 20, 11), dtype, **settings), tmp_path, 'plain')


@pytest.mark.parametrize('operator', OPERATORS)
def test_the_order_of_threads_does_not_matter(programs, tmp_path, operator):
    """To the bit: no barrier is missing, and no sum depends on the order in which threads arrive."""
    case = Case(operator, (2, 40, 37, 19))
    inputs = case.inputs()
    first, second = (case.run(programs[operator]['plain'], inputs, tmp_path, each)[0] for each in (False, True))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), (name, case)


@pytest.mark.parametrize('name', ['x', 'grad_output'])
@pytest.mark.parametrize('operator', OPERATORS)
def test_nan_spreads_as_in_the_reference(programs, tmp_path, operator, name):
    """At corners of the map and of tiles, and within them: where it reaches with a halo, and no further."""
    for row, column in ((0, 0), (32, 8), (10, 7), (34, 17)):
        case = Case(operator, (2, 3, 35, 18))
        inputs = case.inputs()
        inputs[name][0, 1, row, column] = torch.nan
        written, _ = case.run(programs[operator]['plain'], inputs, tmp_path)
        for each, expected in case.expected(inputs).items():
            if each in written:
                assert torch.equal(written[each].isnan().view(expected.shape), expected.isnan()), (each, case)


@pytest.mark.parametrize('operator', OPERATORS)
def test_a_channel_of_zeros_has_no_slope(programs, tmp_path, operator):
    """Its response has none at 0: the gradient stays finite, as the CPU's does."""
    case = Case(operator, (1, 3, 4, 5), bias=False)
    inputs = case.inputs()
    inputs['x'][:, 1] = 0
    written, _ = case.run(programs[operator]['plain'], inputs, tmp_path)
    assert all(tensor.isfinite().all() for tensor in written.values())
    assert (written['response'][:, 1] == 0).all()


def test_gelu_of_large_numbers(programs, tmp_path):
    """The hardware's power is 0 far from 0: the number itself, or 0."""
    case = Case(FUSED, (1, 2, 3, 4), bias=False)
    inputs = case.inputs()
    inputs['weight'].zero_()
    inputs['gamma'].zero_()
    inputs['beta'].zero_()
    inputs['x'][:, 0], inputs['x'][:, 1] = 1e4, -1e4
    written, _ = case.run(programs[FUSED]['plain'], inputs, tmp_path)
    assert (written['output'][:, 0] == 1e4).all() and (written['output'][:, 1] == 0).all()
    assert torch.equal(written['grad_x'][:, 0], inputs['grad_output'][:, 0])
    assert (written['grad_x'][:, 1] == 0).all()


@pytest.mark.parametrize('size', [(0, 4, 3, 3), (2, 0, 3, 3)], ids=['images', 'channels'])
@pytest.mark.parametrize('operator', OPERATORS)
def test_nothing_is_launched_for_an_empty_map(programs, tmp_path, operator, size):
    _, launches = Case(operator, size).run(programs[operator]['sanitized'], Case(operator, size).inputs(), tmp_path)
    assert launches == dict(forward=[], again=[], backward=[])


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case',
    [
        Case(NORM, (2, 40, 30, 17)),
        Case(NORM, (1, 3, 5, 5), torch.bfloat16),
        Case(FUSED, (2, 40, 70, 19)),
        Case(FUSED, (1, 5, 9, 9), torch.float64, bias=False),
        Case(FUSED, (2, 33, 35, 9), torch.float16, gelu=False),
        Case(FUSED, (2, 33, 35, 9), gelu=False, inplace=True),
    ],
    ids=lambda case: f'{case.operator} {case.size}',
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    """A launch reads every operand, once by this count, and nothing else."""
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import NormBytes, bytes_of

    inputs = case.inputs()
    x = inputs['x']
    _, launches = case.run(programs[case.operator]['plain'], inputs, tmp_path)
    fused, suffix = case.operator == FUSED, '_' if case.inplace else ''
    name = ('gelu_' if case.gelu else '') + f'residual_depthwise_norm{suffix}' if fused else 'global_response_norm'
    layers = [inputs['weight'], inputs['bias']] if fused else []
    arguments = [x, *layers, inputs['gamma'], inputs['beta'], EPS]
    strips = torch.ops.overlock_mm._residual_depthwise_norm_strips if fused else torch.ops.overlock_mm._response_norm_strips
    norm = NormBytes(x, strips(x.shape))

    stated = operator_costs.STATED[name](*arguments, outputs=[x])
    written = norm.sums + 2 * norm.per_image + bytes_of([x] * (1 + case.inplace))
    assert (stated.launches, stated.bytes) == cost_of(launches['forward'], written)
    if not case.has_backward:
        return
    name = '_gelu_residual_depthwise_normed' if fused else '_response_normed'
    scale = torch.empty(case.size[:2], dtype=inputs['gamma'].dtype)
    stated = operator_costs.STATED[name](x, *layers, scale, inputs['beta'], outputs=[x])
    assert (stated.launches, stated.bytes) == cost_of(launches['again'], bytes_of([x]))
    assert stated.launches == 1
    name = '_gelu_residual_depthwise_norm_backward' if fused else '_response_norm_backward'
    response = torch.empty(case.size[:2])
    arguments = [inputs['grad_output'], x, *layers, inputs['gamma'], response, EPS]
    stated = operator_costs.STATED[name](*arguments, outputs=[x])
    written = 2 * norm.sums + 4 * norm.per_image + bytes_of([x])
    written += 10 * norm.sums + 12 * norm.per_channel if fused else 2 * norm.per_channel
    assert (stated.launches, stated.bytes) == cost_of(launches['backward'], written)


def cost_of(launches: list[Launch], written: int) -> tuple[int, int]:
    return len(launches), sum(launch.bytes_read for launch in launches) + written
