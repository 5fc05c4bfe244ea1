"""The CUDA kernels of branch norms, run on the host thread by thread (see emulation/), against float64."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import emulated
import pytest
import torch
import torch.nn.functional as F
from emulated import DTYPES, H200, SOURCES, T4, Launch, nan_like, relative_error
from torch import Tensor

from overlock_mm.models.reparam import DILATED_BRANCHES
from overlock_mm.ops.cuda_kernels import has_cuda_kernels

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
    variant: str = 'tiled'  # which of them has to run
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
        grad_weights=empty(channels * sum(k * k for k, _ in case.branches)),
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
        grad_weights=torch.cat([each.grad.flatten() for each in parameters['weights']]),
    )


# The inputs are the same in every run: with others, sums that cancel can miss these limits by a tenth.
# Relative (Frobenius) errors of statistics and sums, of the gradient of the input, and of those of the weights.
TOLERANCES = {
    torch.float32: (5e-7, 1e-6, 1e-6),
    torch.float64: (2e-15, 2e-15, 2e-15),
    torch.float16: (5e-7, 1e-3, 5e-4),
    torch.bfloat16: (5e-7, 6e-3, 4e-3),
}


def tolerance(case: Case, name: str) -> float:
    return TOLERANCES[case.dtype][{'grad_input': 1, 'grad_weights': 2}.get(name, 0)]


def check(program: Path, case: Case, folder: Path) -> list[Launch]:
    inputs = draw(case)
    (actual, launches), expected = run(program, case, inputs, folder), reference(case, inputs)
    variants = {'general' if 'general' in launch.kernel else 'tiled' for launch in launches if is_large(launch)}
    assert variants == {case.variant}
    errors = {name: relative_error(actual[name], expected[name]) for name in RESULTS}
    for name, error in errors.items():
        assert error <= tolerance(case, name), (name, errors, case)
    return launches


def is_large(launch: Launch) -> bool:
    """Whether it is one of the kernels that read maps."""
    return re.search('outputs_kernel|inputs_kernel|general', launch.kernel) is not None


CASES = {
    # The branches of the models. Tiles of 32, 16 and 8 columns, several of them, and channels that do not fill a block.
    '17': Case(of_model(17), (21, 35), 9),
    '15': Case(of_model(15), (17, 9), 8),
    '13': Case(of_model(13), (9, 41), 3, batch=2),
    '11': Case(of_model(11), (35, 6), 8),
    '9': Case(of_model(9), (17, 18), 8),
    '7': Case(of_model(7), (10, 33), 8, batch=2),
    '5': Case(of_model(5), (17, 37), 9),
    # Maps smaller than the kernel, and of one line.
    '13-map-3': Case(of_model(13), (3, 3), 8, batch=2),
    '7-line': Case(of_model(7), (1, 40), 4),
    '9-column': Case(of_model(9), (40, 1), 4),
    # Types.
    '7-float16': Case(of_model(7), (10, 18), 12, dtype=torch.float16),
    '5-bfloat16': Case(of_model(5), (9, 33), 16, dtype=torch.bfloat16),
    '9-bfloat16': Case(of_model(9), (9, 20), 7, dtype=torch.bfloat16),
    '5-float64': Case(of_model(5), (9, 11), 9, batch=2, dtype=torch.float64, variant='general'),
    # Other branches, and less shared memory.
    '3': Case(((3, 1),), (6, 7), 8, batch=2, variant='general'),
    '5-3-1': Case(((5, 1), (3, 2), (1, 1)), (9, 12), 9, batch=2, variant='general'),
    '7-in-another-order': Case(((7, 1), *DILATED_BRANCHES[7][::-1]), (9, 12), 4, variant='general'),
    '19-of-8-branches': Case(((19, 1), *DILATED_BRANCHES[17], (19, 1)), (7, 12), 3, variant='general'),
    '5-3-float16': Case(((5, 1), (3, 1)), (11, 9), 5, dtype=torch.float16, variant='general'),
    '9-T4': Case(of_model(9), (20, 24), 8, shared_memory=T4),
    '17-without-shared-memory': Case(of_model(17), (6, 9), 2, shared_memory=20000, variant='general'),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_pytorch(programs, tmp_path, name):
    check(programs['sanitized'], replace(CASES[name], seed=zlib.crc32(name.encode())), tmp_path)


def test_equals_pytorch_as_shipped(programs, tmp_path):
    """With several tiles to a part: there are as many blocks of channels as keep a device busy."""
    check(programs['plain'], Case(of_model(5), (3, 33), 260 * 8, seed=1), tmp_path)


def test_a_large_mean_does_not_lose_a_small_variance(programs, tmp_path):
    case = Case(of_model(5), (20, 40), 8, mean=1e3, seed=1)
    inputs = draw(case)
    for weight in inputs['weights']:
        middle = weight.shape[-1] // 2
        weight.zero_()[:, :, middle, middle] = 1  # no branch meets the zeros around the map
    (actual, _), expected = run(programs['plain'], case, inputs, tmp_path), reference(case, inputs)
    assert relative_error(actual['variance'], expected['variance']) < 1e-5


@pytest.mark.parametrize(
    'case',
    [Case(of_model(7), (19, 37), 9), Case(((5, 1), (3, 2)), (11, 9), 5, variant='general')],
    ids=['tiled', 'general'],
)
def test_the_order_of_threads_does_not_matter(programs, tmp_path, case):
    inputs = draw(case)
    first, _ = run(programs['plain'], case, inputs, tmp_path)
    other, _ = run(programs['plain'], case, inputs, tmp_path, reversed_threads=True)
    for name in RESULTS:
        assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize('row, column', [(0, 0), (7, 31), (8, 32)])
def test_nan_does_not_reach_other_channels(programs, tmp_path, row, column):
    case = Case(of_model(5), (9, 35), 3)
    inputs = draw(case)
    inputs['input'][0, 1, row, column] = torch.nan
    actual, _ = run(programs['plain'], case, inputs, tmp_path)
    assert actual['grad_input'][:, 1].isnan().all() and actual['mean'][:, 1].isnan().all()
    for name in ('mean', 'products', 'grad_norm_weights'):
        assert actual[name][:, [0, 2]].isfinite().all(), name
    assert actual['grad_input'][:, [0, 2]].isfinite().all()
    of_weights = actual['grad_weights'].split([3 * k * k for k, _ in case.branches])
    assert all(each.view(3, -1)[[0, 2]].isfinite().all() for each in of_weights)


@pytest.mark.skipif(not has_cuda_kernels(), reason='the binary was built without CUDA')
@pytest.mark.parametrize(
    'case',
    [
        Case(of_model(7), (20, 33), 12, batch=2),
        Case(of_model(5), (10, 33), 5, dtype=torch.bfloat16),
        Case(((5, 1), (3, 2)), (9, 14), 5, variant='general'),
    ],
    ids=['tiled', 'bfloat16', 'general'],
)
def test_launches_and_bytes_are_those_that_are_stated(programs, tmp_path, monkeypatch, case):
    """A launch reads every operand, once by this count, and nothing else. What they write follows from the sizes."""
    monkeypatch.syspath_prepend(SOURCES.parents[3] / 'tools' / 'benchmarks')
    import operator_costs
    from operator_costs import bytes_of

    inputs = draw(case)
    results, launches = run(programs['plain'], case, inputs, tmp_path)
    x, grad, weights, norm_weights = (inputs[name] for name in ('input', 'grad_output', 'weights', 'norm_weights'))
    dilations, mean, variance = [dilation for _, dilation in case.branches], results['mean'], results['variance']
    parts, weight_parts = results['parts'].tolist()
    statistics, number = bytes_of([mean]), mean.element_size()
    branches, folded = len(case.branches) * bytes_of([x]), bytes_of([results['kernel'], results['bias']])
    sums = statistics + number * case.channels
    of_weights = bytes_of([results['grad_weights']])

    written = {
        'statistics': parts * (2 * statistics + 8) + 2 * statistics,
        'given': folded,
        'sums': parts * sums + sums + 2 * statistics,
        'gradients': branches + bytes_of([x]) + weight_parts * of_weights + of_weights,
    }
    stated = {
        'statistics': operator_costs.cost_of_branch_statistics(x, weights, dilations, outputs=[mean, variance]),
        'given': operator_costs.cost_of_branch_norms_given(
            x, weights, norm_weights, inputs['norm_biases'], mean, variance, dilations, EPS, outputs=[x]
        )
        + operator_costs.Cost(-1, -2 * bytes_of([x]) - folded),  # the convolution has a test of its own
        'sums': operator_costs.cost_of_branch_norms_sums(
            grad, x, weights, mean, dilations, outputs=[mean[0], mean], of_norms=True
        ),
        'gradients': operator_costs.cost_of_branch_norms_gradients(
            grad, x, weights, norm_weights, mean, variance, mean[0], mean, dilations, EPS, outputs=[x, weights[0]]
        ),
    }
    launched = iter(launches)
    for name, number_of_launches in zip(stated, (2, 1, 2, len(launches) - 5)):
        read = sum(next(launched).bytes_read for _ in range(number_of_launches))
        assert (stated[name].launches, stated[name].bytes) == (number_of_launches, read + written[name]), name
