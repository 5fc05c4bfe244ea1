"""The CUDA kernels of response norms, with and without the layers before them, run on the host thread by thread."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, Launch, build, nan_like, relative_error, run
from torch import Tensor

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
        """Output, response and gradients in float64."""
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
        return dict(output=output.detach(), response=response.detach(), **gradients)

    def run(self, program: Path, inputs: dict, folder: Path, reversed_threads: bool = False) -> tuple[dict, dict]:
        """What the kernels write, and their launches, forward and backward."""
        numbers = [DTYPES.index(self.dtype), *self.size]
        if self.operator == 'response_norm':
            numbers = [*numbers[:3], self.size[2] * self.size[3]]
        else:
            numbers += [self.gelu, self.inplace]
        tensors = [inputs[name] for name in inputs if name != 'grad_output']
        results = [nan_like(inputs['x']), torch.full(self.size[:2], torch.nan, dtype=inputs['gamma'].dtype)]
        options = dict(folder=folder, shared_memory=H200, reversed_threads=reversed_threads)
        arrays, forward = run(program, numbers, [*tensors, *results], **options)
        output, response = arrays[-2:]
        written = dict(output=output, response=response)
        launches = dict(forward=forward)
        if self.has_backward:
            arguments = [*tensors, results[0], response, inputs['grad_output'], results[0]]
            norm = nan_like(inputs['gamma'])
            if self.operator == 'response_norm':
                arguments += [norm, norm]
            else:
                arguments += [nan_like(inputs['weight']), norm, norm, norm]
            arrays, launches['backward'] = run(program, numbers, arguments, **options)
            gradients = arrays[-3 if self.operator == 'response_norm' else -5 :]
            names = [f'grad_{name}' for name in inputs if name != 'grad_output']
            written.update(zip(names, gradients))
        return written, launches


def check(programs: dict, case: Case, folder: Path, kind: str = 'sanitized') -> dict[str, list[Launch]]:
    inputs = case.inputs()
    written, launches = case.run(programs[case.operator][kind], inputs, folder)
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
