"""The CUDA kernels of branch norms, run on the host thread by thread (see emulation/), against float64."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import emulated
import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, Launch, nan_like, relative_error
from torch import Tensor

from overlock_mm.models.reparam import DILATED_BRANCHES

EPS = 1e-5


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
    return emulated.build('branch_norms', tmp_path_factory.mktemp('branch_norms'))


def of_model(kernel_size: int) -> tuple[tuple[int, int], ...]:
    return ((kernel_size, 1), *DILATED_BRANCHES[kernel_size])


@dataclass
class Case:
    """A step of the operator: sizes and branches. Inputs are drawn from `seed`."""

    branches: tuple[tuple[int, int], ...]
    size: tuple[int, int] = (7, 9)
    channels: int = 9
    batch: int = 1
    dtype: torch.dtype = torch.float32
    variant: str = 'tiles'
    shared_memory: int = H200
    mean: float = 0.0  # of the input
    seed: int = 0

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


PARAMETERS = ('weights', 'norm_weights', 'norm_biases')
RESULTS = ('mean', 'variance', 'kernel', 'bias', 'grad_sum', 'products', 'grad_norm_weights', 'grad_norm_biases')
RESULTS += ('grad_input', 'grad_weights')


def draw(case: Case) -> dict:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape, dtype=case.accumulator):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def random_map():
        return random(case.batch, case.channels, *case.size, dtype=case.dtype).contiguous(memory_format=torch.channels_last)

    return dict(
        input=random_map() + case.mean,
        grad_output=random_map(),
        weights=[random(case.channels, 1, k, k) / k for k, _ in case.branches],
        norm_weights=[random(case.channels) for _ in case.branches],
        norm_biases=[random(case.channels) for _ in case.branches],
    )


def run(program: Path, case: Case, inputs: dict, folder: Path, **options) -> tuple[dict[str, Tensor], list[Launch]]:
    """A step by the kernels, into outputs that were filled with NaN."""
    channels, branches, side = case.channels, len(case.branches), case.branches[0][0]

    def empty(*shape):
        return torch.full(shape, torch.nan, dtype=case.accumulator)

    outputs = dict(
        mean=empty(branches, channels),
        variance=empty(branches, channels),
        kernel=empty(channels, 1, side, side),
        bias=empty(channels),
        grad_sum=empty(channels),
        products=empty(branches, channels),
        grad_norm_weights=empty(branches, channels),
        grad_norm_biases=empty(branches, channels),
        grad_input=nan_like(inputs['input']),
        grad_weights=empty(channels, sum(k * k for k, _ in case.branches)),
    )
    numbers = [DTYPES.index(case.dtype), case.batch, channels, *case.size, branches, round(1 / EPS), True]
    numbers += [number for branch in case.branches for number in branch]
    arrays = [inputs['input'], inputs['grad_output'], *(each for name in PARAMETERS for each in inputs[name])]
    arrays += [*outputs.values(), torch.zeros(2, dtype=torch.int64)]
    done, launches = emulated.run(program, numbers, arrays, folder, case.shared_memory, **options)
    *results, parts = done[len(arrays) - len(outputs) - 1 :]
    return dict(zip(outputs, results), parts=parts), launches


def reference(case: Case, inputs: dict) -> dict[str, Tensor]:
    """The same by autograd on convolutions and batch norms of PyTorch, in float64."""
    x = inputs['input'].double().requires_grad_()
    parameters = {name: [each.double().requires_grad_() for each in inputs[name]] for name in PARAMETERS}
    side, positions = case.branches[0][0], case.batch * case.size[0] * case.size[1]
    out, kernel, bias, outputs, means, variances = 0, 0, 0, [], [], []
    for (k, dilation), weight, gamma, beta in zip(case.branches, *parameters.values()):
        y = F.conv2d(x, weight, padding=k // 2 * dilation, dilation=dilation, groups=case.channels)
        out = out + F.batch_norm(y, None, None, gamma, beta, training=True, eps=EPS)
        variance, mean = torch.var_mean(y.detach(), (0, 2, 3), unbiased=False)
        scale = gamma.detach() / (variance + EPS).sqrt()
        margin = side // 2 - k // 2 * dilation
        spread = torch.zeros(case.channels, 1, side, side, dtype=torch.float64)
        spread[..., margin : side - margin : dilation, margin : side - margin : dilation] = weight.detach()
        kernel = kernel + spread * scale.view(-1, 1, 1, 1)
        bias = bias + beta.detach() - mean * scale
        for each, one in ((outputs, y.detach()), (means, mean), (variances, variance)):
            each.append(one)
    grad = inputs['grad_output'].double()
    out.backward(grad)
    products = [((y - mean.view(1, -1, 1, 1)) * grad).sum((0, 2, 3)) for y, mean in zip(outputs, means)]
    return dict(
        mean=torch.stack(means),
        variance=torch.stack(variances),
        kernel=kernel,
        bias=bias,
        grad_sum=grad.sum((0, 2, 3)) / positions,
        products=torch.stack(products) / positions,
        grad_norm_weights=torch.stack([each.grad for each in parameters['norm_weights']]),
        grad_norm_biases=torch.stack([each.grad for each in parameters['norm_biases']]),
        grad_input=x.grad,
        grad_weights=torch.cat([each.grad.flatten(1) for each in parameters['weights']], 1),
    )


TOLERANCES = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def check(program: Path, case: Case, folder: Path) -> dict[str, float]:
    inputs = draw(case)
    (actual, launches), expected = run(program, case, inputs, folder), reference(case, inputs)
    variants = {'general' if 'general' in launch.kernel else 'tiles' for launch in launches if is_large(launch)}
    assert variants == {case.variant}
    errors = {name: relative_error(actual[name], expected[name]) for name in RESULTS}
    for name, error in errors.items():
        assert error <= TOLERANCES[case.dtype], (name, errors, case)
    return errors


def is_large(launch: Launch) -> bool:
    """Whether it is one of the kernels that read maps."""
    return re.search('outputs_kernel|inputs_kernel|general', launch.kernel) is not None


CASES = {
    **{f'{k}': Case(of_model(k), (k + 8, k + 20), batch=2, seed=k) for k in sorted(DILATED_BRANCHES)},
    'general': Case(((5, 1), (3, 2), (1, 1)), batch=2, variant='general'),
    'float64': Case(of_model(5), (9, 11), batch=2, dtype=torch.float64, variant='general'),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(programs, tmp_path, name):
    check(programs['plain'], CASES[name], tmp_path)
