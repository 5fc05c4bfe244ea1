"""Branch norms in parts: one after the other they are the whole. (Exchanges: tests/test_models/test_sync_norms.py.)"""

from __future__ import annotations

import contextlib
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import relative_error
from test_depthwise import LAYOUTS, lists_of, make_branches, plain_branches, to, with_gradients
from torch import Tensor

from overlock_mm.ops import branch_norms, sync_branch_norms, use_references
from overlock_mm.ops._library import operator
from overlock_mm.ops.sync_norms import sync_batch_norm

pytestmark = pytest.mark.skipif(
    os.environ.get('OVERLOCK_MM_WITH_OPS') == '0', reason='OVERLOCK_MM_WITH_OPS=0: built without the compiled operator'
)

implementations = pytest.mark.parametrize('implementation', [contextlib.nullcontext, use_references])

OF_ZOO = ((17, 1), (5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7))
SHAPES = [
    dict(),
    dict(batch=3, channels=17, height=12, width=20, branches=((7, 1), (5, 1), (3, 2), (3, 3))),
    dict(batch=1, channels=9, height=5, width=30, branches=OF_ZOO),  # lower than the kernels
    dict(batch=2, channels=1, height=7, width=8, branches=((3, 1),)),
]


def gradients_in_parts(grad_output: Tensor, x: Tensor, dilations: list, eps: float = 1e-5, **tensors: Tensor) -> dict:
    """Output and gradients, with all processes' sums those of this one."""
    weights, norm_weights, norm_biases = lists_of(dilations, tensors)
    mean, variance = operator('_branch_statistics')(x, weights, dilations)
    out = operator('_branch_norms_given')(x, weights, norm_weights, norm_biases, mean, variance, dilations, eps)
    grad_sum, products = operator('_branch_norms_sums')(grad_output, x, weights, mean, dilations)
    count = x.numel() / x.shape[1]
    grad_x, grad_weights = operator('_branch_norms_gradients')(
        grad_output, x, weights, norm_weights, mean, variance, grad_sum / count, products / count, dilations, eps
    )
    grad_norm_weights = products * torch.rsqrt(variance + eps)
    gradients = dict(output=out, x=grad_x)
    of_kernels = grad_weights.split([weight.numel() for weight in weights])
    for i, weight in enumerate(weights):
        gradients[f'weight{i}'] = of_kernels[i].reshape(weight.shape)
        gradients[f'norm_weight{i}'] = grad_norm_weights[i]
        gradients[f'norm_bias{i}'] = grad_sum
    return gradients


@implementations
@pytest.mark.parametrize('layout', sorted(LAYOUTS))
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_parts_are_the_whole(shape, layout, implementation):
    arguments = make_branches(**shape)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    grad_output = LAYOUTS[layout](torch.randn_like(arguments['x'], memory_format=torch.contiguous_format))
    expected = with_gradients(plain_branches, arguments, grad_output)
    with implementation():
        got = gradients_in_parts(grad_output, **arguments)
    assert got.keys() == expected.keys()
    least = grad_output.norm()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert (got[name] - value).norm() < 1e-12 * max(value.norm(), least), name
    for name in ('output', 'x'):
        assert got[name].is_contiguous(memory_format=memory_format(arguments['x']))


def memory_format(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


@implementations
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 3e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_dtypes(dtype, tolerance, implementation):
    """Parameters are float32 beside half types; sums and statistics, and gradients of kernels, are float32."""
    arguments = to(make_branches(batch=2, channels=16, height=20, width=20), torch.float32)
    arguments['x'] = arguments['x'].to(dtype)
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(plain_branches, to(arguments, torch.float64), grad_output)
    with implementation():
        got = gradients_in_parts(grad_output, **arguments)
    least = 0.1 * grad_output.double().norm()
    for name, value in expected.items():
        assert (got[name].double() - value).norm() < tolerance * max(value.norm(), least), name
        assert got[name].dtype == (dtype if name in ('output', 'x') else torch.float32), name


def test_parts_do_not_depend_on_threads():
    arguments = to(make_branches(batch=3, channels=37, height=30, width=45), torch.float32)
    grad_output = torch.randn_like(arguments['x'])
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(gradients_in_parts(grad_output, **arguments))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert all(torch.equal(got[name], value) for name, value in results[0].items())


@pytest.mark.parametrize(
    'implementation, shape',
    [
        (contextlib.nullcontext, (0, 5, 6, 9)),
        (contextlib.nullcontext, (2, 5, 0, 9)),
        (use_references, (0, 5, 6, 9)),  # PyTorch convolves no maps without lines
    ],
)
def test_a_map_without_values(implementation, shape):
    """Of a process that has none: zeros in the exchange, and a gradient without values."""
    arguments = make_branches()
    dilations = arguments.pop('dilations')
    x = arguments.pop('x').new_empty(shape)
    weights, norm_weights, norm_biases = lists_of(dilations, arguments)
    with implementation():
        mean, variance = operator('_branch_statistics')(x, weights, dilations)
        assert torch.equal(mean, torch.zeros(3, 5).double()) and torch.equal(variance, mean)
        out = operator('_branch_norms_given')(x, weights, norm_weights, norm_biases, mean, variance, dilations, 1e-5)
        sums = operator('_branch_norms_sums')(x, x, weights, mean, dilations)
        grad_x, grad_weights = operator('_branch_norms_gradients')(
            x, x, weights, norm_weights, mean, variance, mean[0], mean, dilations, 1e-5
        )
    assert out.shape == grad_x.shape == shape
    assert not any(each.any() for each in (*sums, grad_weights))


@implementations
def test_small_variances_beside_large_means(implementation):
    """A variance of 1e-6 about a mean of 1, in float32."""
    x = 1 + 1e-3 * torch.randn(2, 8, 24, 25)
    with implementation():
        mean, variance = operator('_branch_statistics')(x, [torch.ones(8, 1, 1, 1)], [1])
    assert relative_error(mean, x.double().mean(dim=(0, 2, 3)).unsqueeze(0)) < 1e-7
    assert relative_error(variance, x.double().var(dim=(0, 2, 3), correction=0).unsqueeze(0)) < 1e-5


WRONG = {
    'mean': lambda x: x[:, :-1],
    'variance': lambda x: x[:-1],
    'grad_mean': lambda x: x[:-1],
    'product_mean': lambda x: x.to(torch.complex64),
    'grad_output': lambda x: x[:, :, 1:],
}


@implementations
@pytest.mark.parametrize('name', sorted(WRONG))
def test_errors_name_the_argument(name, implementation):
    arguments = make_branches()
    dilations = arguments.pop('dilations')
    x = arguments.pop('x')
    weights, norm_weights, norm_biases = lists_of(dilations, arguments)
    mean = torch.zeros(3, 5).double()
    given = dict(grad_output=x, mean=mean, variance=mean, grad_mean=mean[0], product_mean=mean)
    given[name] = WRONG[name](given[name])
    with implementation():
        calls = [
            partial(
                operator('_branch_norms_gradients'), given['grad_output'], x, weights, norm_weights, given['mean'],
                given['variance'], given['grad_mean'], given['product_mean'], dilations, 1e-5,
            ),
            partial(
                operator('_branch_norms_given'), x, weights, norm_weights, norm_biases, given['mean'], given['variance'],
                dilations, 1e-5,
            ),
            partial(operator('_branch_norms_sums'), given['grad_output'], x, weights, given['mean'], dilations),
        ]  # fmt: skip
        takes = dict(mean=(0, 1, 2), variance=(0, 1), grad_output=(0, 2)).get(name, (0,))
        for i in takes:
            with pytest.raises((ValueError, TypeError), match=rf'\b{name} must'):
                calls[i]()


# ------------------------------------------------------------------------------------- the operators, of one process


@pytest.fixture
def one_process():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sync_branches(x: Tensor, dilations: list, **tensors: Tensor) -> Tensor:
    return sync_branch_norms(x, *lists_of(dilations, tensors), dilations)[0]


def sync_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return sync_batch_norm(x, None, None, weight, bias, 0.1, 1e-5)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def make_norm(dtype: torch.dtype = torch.float64) -> dict:
    """Parameters are float32 beside half types."""
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64).to(dtype)
    return dict(x=x, weight=torch.randn(5, dtype=of_parameters), bias=torch.randn(5, dtype=of_parameters))


CALLS = {'branches': (sync_branches, plain_branches, make_branches), 'norm': (sync_norm, plain_norm, make_norm)}
calls = pytest.mark.parametrize('name', sorted(CALLS))


@calls
def test_torch_compile(name, one_process):
    """In one graph, with the exchanges, forward and backward."""
    function, plain, make = CALLS[name]
    arguments = make()
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(plain, arguments, grad_output)
    torch._dynamo.reset()
    got = with_gradients(torch.compile(function, fullgraph=True, backend='aot_eager'), arguments, grad_output)
    for key, value in expected.items():
        assert (got[key] - value).norm() < 1e-12 * max(value.norm(), grad_output.norm()), key


@pytest.mark.parametrize(
    'name, wanted',
    [
        ('norm', ('x',)),
        ('norm', ('weight',)),
        ('norm', ('x', 'bias')),
        ('branches', ('x',)),
        ('branches', ('weight1',)),
        ('branches', ('norm_weight1', 'norm_bias0')),
        ('branches', ('weight0', 'norm_bias2')),
    ],
    ids=str,
)
def test_some_gradients(name, wanted, one_process):
    function, plain, make = CALLS[name]
    arguments = make()
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(plain, arguments, grad_output, wanted)
    got = with_gradients(function, arguments, grad_output, wanted)
    assert got.keys() == expected.keys() == {'output', *wanted}
    for key, value in expected.items():
        assert (got[key] - value).norm() < 1e-12 * max(value.norm(), grad_output.norm()), key


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed'])
def test_half_types_of_a_norm(dtype, tolerance, layout, one_process):
    arguments = make_norm(dtype)
    arguments['x'] = LAYOUTS[layout](100 + arguments['x'])  # a mean that takes most of the digits
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(plain_norm, to(arguments, torch.float64), grad_output.double())
    got = with_gradients(sync_norm, arguments, grad_output)
    for key, value in expected.items():
        assert (got[key].double() - value).norm() < tolerance * max(value.norm(), grad_output.norm()), key
        assert got[key].dtype == (dtype if key in ('output', 'x') else torch.float32)
    assert got['output'].is_contiguous(memory_format=memory_format(arguments['x']))


def test_statistics_of_branches(one_process):
    arguments = make_branches()
    dilations = arguments.pop('dilations')
    x = arguments.pop('x')
    lists = lists_of(dilations, arguments)
    out, mean, variance, count = sync_branch_norms(x, *lists, dilations)
    for got, expected in zip((out, mean, variance), branch_norms(x, *lists, dilations)):
        assert relative_error(got, expected) < 1e-12
    assert count.tolist() == [2 * 6 * 9]
