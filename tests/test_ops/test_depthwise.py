"""Depth-wise convolutions and the norms around them against plain PyTorch in float64, and their contract."""

from __future__ import annotations

import itertools
import os
import platform
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from conftest import KeptBytes, autocast_dtypes, devices, instruction_sets, relative_error, run_with_instruction_set
from test_compiled import run_without_binary
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from overlock_mm.ops import (
    _library,
    branch_norms,
    depthwise_conv2d,
    gelu,
    gelu_residual_depthwise_norm,
    global_response_norm,
    norms,
    residual_depthwise_conv2d,
    residual_depthwise_norm,
    use_references,
)
from overlock_mm.ops.cuda_kernels import has_cuda_kernels
from overlock_mm.ops.elementwise import scale_and_shift, scaled_sum

pytestmark = pytest.mark.skipif(
    os.environ.get('OVERLOCK_MM_WITH_OPS') == '0', reason='OVERLOCK_MM_WITH_OPS=0: built without the compiled operator'
)

TORCH = tuple(map(int, torch.__version__.split('.')[:2]))
HAS_WIDE_KERNELS = platform.machine() != 'x86_64' or 'avx512f' in Path('/proc/cpuinfo').read_text()
HAS_FAST_BFLOAT16 = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()


# The operators with all their tensors as keywords, the same in plain PyTorch, and arguments for them.


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make_convolution(batch=2, channels=5, height=6, width=9, kernel_size=3, bias=True, **settings) -> dict:
    return dict(
        x=random(batch, channels, height, width),
        weight=random(channels, 1, kernel_size, kernel_size) / kernel_size,
        bias=random(channels) if bias else None,
        **settings,
    )


def plain_convolution(x, weight, bias, dilation=1):
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def plain_residual(x, weight, bias):
    return x + plain_convolution(x, weight, bias)


def make_map(batch=2, channels=5, height=6, width=9) -> dict:
    return dict(x=random(batch, channels, height, width))


def make_response_norm(batch=2, channels=5, height=6, width=9) -> dict:
    return dict(x=random(batch, channels, height, width), gamma=random(channels), beta=random(channels))


def plain_response_norm(x, gamma, beta, eps=1e-6):
    norm = x.square().sum(dim=(2, 3), keepdim=True).sqrt()
    norm = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return x * (gamma.view(1, -1, 1, 1) * norm + 1) + beta.view(1, -1, 1, 1)


def make_norm(**settings) -> dict:
    arguments = make_convolution(**settings)
    channels = arguments['x'].shape[1]
    return dict(**arguments, gamma=random(channels), beta=random(channels))


def plain_norm(x, weight, bias, gamma, beta, eps=1e-6):
    return plain_response_norm(plain_residual(x, weight, bias), gamma, beta, eps)


def plain_gelu_norm(x, weight, bias, gamma, beta, eps=1e-6):
    return plain_norm(F.gelu(x), weight, bias, gamma, beta, eps)


def make_branches(batch=2, channels=5, height=6, width=9, branches=((5, 1), (3, 1), (3, 2))) -> dict:
    arguments = dict(x=random(batch, channels, height, width), dilations=[dilation for _, dilation in branches])
    for i, (k, _) in enumerate(branches):
        arguments[f'weight{i}'] = random(channels, 1, k, k) / k
    for i in range(len(branches)):
        arguments[f'norm_weight{i}'] = random(channels)
    for i in range(len(branches)):
        arguments[f'norm_bias{i}'] = random(channels)
    return arguments


def lists_of(dilations: list, tensors: dict) -> list:
    return [[tensors[f'{name}{i}'] for i in range(len(dilations))] for name in ('weight', 'norm_weight', 'norm_bias')]


def all_of_branches(x, dilations, eps=1e-5, **tensors):
    return branch_norms(x, *lists_of(dilations, tensors), dilations, eps)


def compiled_branches(x, dilations, eps=1e-5, **tensors):
    return all_of_branches(x, dilations, eps, **tensors)[0]


def plain_branches(x, dilations, eps=1e-5, **tensors):
    out = 0
    for weight, norm_weight, norm_bias, dilation in zip(*lists_of(dilations, tensors), dilations):
        y = plain_convolution(x, weight, None, dilation)
        out = out + F.batch_norm(y, None, None, norm_weight, norm_bias, training=True, eps=eps)
    return out


class Operator(NamedTuple):
    run: Callable
    plain: Callable
    make: Callable


OPERATORS = {
    'convolution': Operator(depthwise_conv2d, plain_convolution, make_convolution),
    'residual': Operator(residual_depthwise_conv2d, plain_residual, make_convolution),
    'gelu': Operator(gelu, F.gelu, make_map),
    'norm': Operator(residual_depthwise_norm, plain_norm, make_norm),
    'gelu_norm': Operator(gelu_residual_depthwise_norm, plain_gelu_norm, make_norm),
    'response_norm': Operator(global_response_norm, plain_response_norm, make_response_norm),
    'branches': Operator(compiled_branches, plain_branches, make_branches),
}
operators = pytest.mark.parametrize('name', OPERATORS)

#: One setting of each kernel that an operator has: streamed and by blocks.
CASES = [
    ('convolution', dict()),
    ('convolution', dict(kernel_size=7)),
    ('convolution', dict(kernel_size=3, dilation=2)),
    ('residual', dict()),
    ('residual', dict(kernel_size=5)),
    ('gelu', dict()),
    ('norm', dict()),
    ('gelu_norm', dict()),
    ('response_norm', dict()),
    ('branches', dict()),
]
cases = pytest.mark.parametrize('name, settings', CASES, ids=str)

LAYOUTS = {
    'contiguous': Tensor.contiguous,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'slice': lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    'slice of channels_last': lambda x: (
        torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :]
    ),
    'strided': lambda x: torch.stack([x, x], dim=-1)[..., 0],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def to(arguments: dict, dtype: torch.dtype, *names: str) -> dict:
    """The arguments, with their tensors (all, or those with the names) in the dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and (not names or name in names) else value
        for name, value in arguments.items()
    }


def with_gradients(
    function: Callable, arguments: dict, grad_output: Tensor, wanted: Optional[tuple] = None
) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors among the arguments, or of the wanted ones."""
    leaves = {
        name: value.detach().requires_grad_(wanted is None or name in wanted)
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    out = function(**{**arguments, **leaves})
    asked = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in asked], grad_output.to(out.dtype))
    return dict(output=out.detach(), **dict(zip(asked, grads)))


def errors(got: dict, expected: dict, least: float) -> dict[str, float]:
    """The norm of each difference, divided by the norm of the expected tensor, or by ``least`` if that is larger."""
    return {
        name: ((got[name].double() - y.double()).norm() / max(y.double().norm().item(), least)).item()
        for name, y in expected.items()
    }


def check(name: str, arguments: dict, dtype: torch.dtype, tolerance: float, layout: str = 'contiguous') -> None:
    """Check the output, with and without gradients, and all gradients, in the layout."""
    operator = OPERATORS[name]
    arguments = to(arguments, dtype)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    grad_output = LAYOUTS[layout](torch.randn_like(arguments['x'], memory_format=torch.contiguous_format))
    exact = to(arguments, torch.float64)
    expected = with_gradients(operator.plain, exact, grad_output)
    got = with_gradients(operator.run, arguments, grad_output)
    with torch.no_grad():
        inference = operator.run(**arguments)
    least = 0.5 * grad_output.double().norm().item()
    limits = dict.fromkeys(expected, tolerance)
    if name == 'branches' and dtype == torch.float32:
        # A small variance amplifies every rounding error, also that of PyTorch in this dtype.
        plain = errors(with_gradients(operator.plain, arguments, grad_output), expected, least)
        limits = {each: max(tolerance, 4 * error) for each, error in plain.items()}
    for each, error in errors(got, expected, least).items():
        assert error < limits[each], (each, error)
        shape, own = (grad_output.shape, dtype) if each == 'output' else (arguments[each].shape, arguments[each].dtype)
        assert (got[each].shape, got[each].dtype) == (shape, own), each
    assert errors(dict(output=inference), dict(output=expected['output']), least)['output'] < limits['output']
    for out in (got['output'], inference):
        assert out.dtype == dtype
        if layout in ('contiguous', 'channels_last'):
            assert out.stride() == LAYOUTS[layout](out).stride()


@operators
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_random_shapes(name, dtype, tolerance):
    """Among them: fewer channels than a vector has lanes, maps smaller than the kernel, maps of one position."""
    hypothesis = pytest.importorskip('hypothesis', reason='hypothesis is not installed (requirements/dev.txt)')
    st = hypothesis.strategies
    integers = st.integers
    shapes = dict(
        batch=integers(1, 3),
        channels=st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 40, 129, 150]),
        height=integers(1, 24),
        width=integers(1, 30),
    )
    if name == 'convolution':
        shapes.update(kernel_size=st.sampled_from([1, *range(3, 33, 2)]), dilation=integers(1, 4), bias=st.booleans())
    elif name == 'residual':
        shapes.update(kernel_size=st.sampled_from([1, 3, 3, 5, 7, 13]), bias=st.booleans())
    elif name in ('norm', 'gelu_norm'):
        shapes.update(bias=st.booleans())
    elif name == 'branches':
        choices = [((3, 1),), ((3, 1), (3, 1)), ((7, 1), (5, 1), (3, 2), (3, 3)), ((13, 1), (7, 2), (3, 5), (5, 3))]
        # Over a few values a norm's gradient is a small difference of large numbers, which needs the digits of float64.
        least = 2 if dtype == torch.float64 else 8
        shapes.update(branches=st.sampled_from(choices), height=integers(least, 24), width=integers(least + 1, 30))

    @hypothesis.settings(
        max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True, database=None
    )
    @hypothesis.given(shape=st.fixed_dictionaries(shapes), layout=st.sampled_from(sorted(LAYOUTS)), seed=integers(0, 2**31))
    def check_one(shape, layout, seed):
        torch.manual_seed(seed)
        check(name, OPERATORS[name].make(**shape), dtype, tolerance, layout)

    check_one()


@pytest.mark.parametrize('kernel_size', range(1, 32, 2))
def test_every_kernel_size(kernel_size):
    for settings in (dict(height=5, width=7), dict(batch=1, channels=18, height=40, width=13)):
        check('convolution', make_convolution(kernel_size=kernel_size, **settings), torch.float32, 2e-6)
        check('convolution', make_convolution(kernel_size=kernel_size, **settings), torch.float64, 1e-12, 'channels_last')


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('size', [1, 6, 40])
def test_any_dilation(size, layout):
    """Taps beyond the map read zeros, however far away they are: nothing is as large as the dilation."""
    for kernel_size in (1, 3, 5):
        arguments = make_convolution(height=size, width=size, kernel_size=kernel_size, bias=False)
        x = arguments['x'] = LAYOUTS[layout](arguments['x'])
        middle = arguments['weight'][:, 0, kernel_size // 2, kernel_size // 2].view(1, -1, 1, 1)
        for dilation in (size, 10**6, 2**31 - 1):
            got = with_gradients(partial(depthwise_conv2d, dilation=dilation), arguments, x)
            assert relative_error(got['output'], x * middle) < 1e-15
            assert relative_error(got['x'], x * middle) < 1e-15
            assert relative_error(got['weight'].sum(dim=(1, 2, 3)), x.square().sum(dim=(0, 2, 3))) < 1e-14
        # The operator itself has no limit.
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out = torch.ops.overlock_mm.depthwise_conv2d(x, arguments['weight'], None, 2**62, False)
                assert relative_error(out, x * middle) < 1e-15


def test_no_dilation_makes_a_branch_reach_further_than_the_first():
    """A product of sizes that does not fit into 64 bits is not taken for a small one."""
    x, weight, parameter = random(1, 5, 6, 7), random(5, 1, 5, 5), random(5)
    with pytest.raises(ValueError, match='the first branch must reach as far as any'):
        torch.ops.overlock_mm.branch_norms(x, [weight] * 2, [parameter] * 2, [parameter] * 2, [1, 2**62], 1e-5)
    taps = [weight, weight[..., :1, :1]]
    expected = branch_norms(x, taps, [parameter] * 2, [parameter] * 2, [1, 1])
    got = torch.ops.overlock_mm.branch_norms(x, taps, [parameter] * 2, [parameter] * 2, [1, 2**62], 1e-5)
    assert all(torch.equal(*pair) for pair in zip(got, expected))


@cases
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(name, settings, layout):
    for shape in (dict(channels=20, height=10, width=11), dict(batch=3, channels=4, height=3, width=3)):
        check(name, OPERATORS[name].make(**shape, **settings), torch.float64, 1e-12, layout)


def test_strided_parameters():
    """And an expanded grad_output, as the backward of sum() makes it."""
    for name, settings in CASES:
        operator = OPERATORS[name]
        arguments = operator.make(**settings, channels=9)
        grad_output = torch.ones((), dtype=torch.float64).expand_as(arguments['x'])
        expected = with_gradients(operator.plain, arguments, grad_output)
        for each, value in arguments.items():
            if isinstance(value, Tensor) and each != 'x':
                arguments[each] = torch.stack([value, value], dim=-1)[..., 0]
        least = grad_output.norm().item()
        assert max(errors(with_gradients(operator.run, arguments, grad_output), expected, least).values()) < 1e-12


@pytest.mark.parametrize('implementation', ['references', 'fallbacks'])
def test_strided_parameters_of_branch_norms_without_the_binary(implementation, monkeypatch):
    """In channels_last, where the gradient of PyTorch's batch norm takes them for dense ones."""
    monkeypatch.setattr(norms, 'operator', getattr(_library, implementation).__getitem__)
    arguments = make_branches()
    arguments['x'] = LAYOUTS['channels_last'](arguments['x'])
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(plain_branches, arguments, grad_output)
    for each, value in arguments.items():
        if each.startswith('norm_'):
            arguments[each] = torch.stack([value, value], dim=-1)[..., 0]
    got = with_gradients(compiled_branches, arguments, grad_output)
    assert max(errors(got, expected, grad_output.norm().item()).values()) < 1e-12


@cases
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_half_types(name, settings, dtype, tolerance, layout):
    check(name, OPERATORS[name].make(channels=18, height=12, width=13, **settings), dtype, tolerance, layout)


@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (5, 1), (5, 3), (9, 2), (15, 1)])
@pytest.mark.parametrize('parameters', ['bfloat16', 'bfloat16 without bias', 'float32 bias', 'float32'])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_large_maps_of_bfloat16(kernel_size, dilation, parameters, layout):
    """Where oneDNN may be the faster one: it does not get arguments that it does not support."""
    settings = dict(kernel_size=kernel_size, dilation=dilation)
    arguments = to(OPERATORS['convolution'].make(channels=18, height=24, width=26, **settings), torch.bfloat16)
    for name in ('weight', 'bias'):
        if parameters == 'float32' or (name, parameters) == ('bias', 'float32 bias'):
            arguments[name] = arguments[name].float()
    if 'without' in parameters:
        arguments['bias'] = None
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    grad_output = LAYOUTS[layout](torch.randn_like(arguments['x']))
    run, plain = OPERATORS['convolution'].run, OPERATORS['convolution'].plain
    expected = with_gradients(plain, to(arguments, torch.float64), grad_output)
    got = with_gradients(run, arguments, grad_output)
    for each, error in errors(got, expected, 0.1 * grad_output.double().norm().item()).items():
        assert error < 8e-3, (each, error)
        of = grad_output if each == 'output' else arguments[each]
        assert (got[each].shape, got[each].dtype) == (of.shape, of.dtype), each
    with torch.no_grad():
        inference = run(**arguments)
    assert relative_error(inference, expected['output']) < 8e-3
    assert (inference.stride(), inference.dtype) == (arguments['x'].stride(), torch.bfloat16)


@cases
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
def test_float32_parameters_beside_half_maps(name, settings, layout, dtype, tolerance):
    """As under autocast: their gradients are not rounded to half. With gradients and without."""
    operator = OPERATORS[name]
    arguments = to(operator.make(channels=18, height=12, width=13, **settings), torch.float32)
    arguments['x'] = LAYOUTS[layout](arguments['x'].to(dtype))
    grad_output = LAYOUTS[layout](torch.randn_like(arguments['x']))
    expected = with_gradients(operator.plain, to(arguments, torch.float64), grad_output)
    got = with_gradients(operator.run, arguments, grad_output)
    for each, error in errors(got, expected, 0.1 * grad_output.double().norm().item()).items():
        assert error < tolerance, (each, error)
        assert got[each].dtype == (dtype if each in ('output', 'x') else torch.float32), each
    with torch.no_grad():
        inference = operator.run(**arguments)
    assert inference.dtype == dtype
    assert relative_error(inference, expected['output']) < tolerance


MAP = dict(channels=35, height=21, width=26)  # two whole vectors of channels and a part


@pytest.mark.parametrize(
    'name, settings',
    [
        ('convolution', dict(kernel_size=5)),
        ('convolution', dict(kernel_size=13)),
        ('convolution', dict(kernel_size=17, channels=8)),  # fewer channels than a vector has lanes
        ('convolution', dict(kernel_size=5, dilation=3)),
        ('residual', dict(kernel_size=3)),
        ('residual', dict(kernel_size=7)),
        ('norm', dict()),
        ('norm', dict(channels=5, bias=False)),
        ('gelu_norm', dict()),
        ('response_norm', dict()),
        ('response_norm', dict(channels=5)),
        ('branches', dict(branches=((7, 1), (5, 1), (3, 2), (3, 3)))),
        ('branches', dict(branches=((13, 1), (5, 1), (3, 4)), channels=7)),
    ],
    ids=str,
)
def test_bfloat16_is_as_exact_as_pytorch(name, settings):
    """Errors against float64, with float32 parameters as under autocast, beside those of PyTorch's operators in bfloat16.

    They are root mean squares over six draws: one draw's error of a few numbers may be small by chance. Left out: PyTorch's
    gradient of a dilated kernel, which is wrong in bfloat16 (torch 2.11).
    """
    torch.manual_seed(secrets.randbits(31))
    operator, draws = OPERATORS[name], []
    for _ in range(6):
        arguments = to(operator.make(**{**MAP, **settings}), torch.float32)
        arguments['x'] = LAYOUTS['channels_last'](arguments['x'].bfloat16())
        grad_output = LAYOUTS['channels_last'](torch.randn(arguments['x'].shape).bfloat16())
        expected = with_gradients(operator.plain, to(arguments, torch.float64), grad_output)
        least = 0.1 * grad_output.double().norm().item()
        of_pytorch = errors(with_gradients(operator.plain, to(arguments, torch.bfloat16), grad_output), expected, least)
        found = errors(with_gradients(operator.run, arguments, grad_output), expected, least)
        with torch.no_grad():
            inference = operator.run(**arguments)
        assert inference.dtype == torch.bfloat16
        found['inference'], of_pytorch['inference'] = relative_error(inference, expected['output']), of_pytorch['output']
        draws.append((found, of_pytorch))
    dilated = {f'weight{i}' for i, (_, dilation) in enumerate(settings.get('branches', ())) if dilation > 1}
    if 'dilation' in settings:
        dilated = {'weight'}
    for each in found.keys() - dilated:
        ours, pytorchs = (sum(draw[i][each] ** 2 for draw in draws) ** 0.5 for i in (0, 1))
        assert ours <= pytorchs, (each, ours, pytorchs)


def test_norm_of_bfloat16_in_place():
    torch.manual_seed(secrets.randbits(31))
    for settings in (MAP, dict(channels=5, height=40, width=7)):
        arguments = to(make_norm(**settings), torch.float32)
        x = arguments['x'] = LAYOUTS['channels_last'](arguments['x'].bfloat16())
        expected = residual_depthwise_norm(**arguments)
        exact = plain_norm(**to(arguments, torch.float64))
        assert residual_depthwise_norm(**arguments, inplace=True) is x
        assert torch.equal(x, expected)
        assert relative_error(x, exact) < 2.5e-3  # one rounding: at most 2^-9 of each number


@cases
def test_gradcheck(name, settings):
    operator = OPERATORS[name]
    arguments = operator.make(batch=2, channels=3, height=4, width=5, **settings)
    tensors = {each: value.requires_grad_() for each, value in arguments.items() if isinstance(value, Tensor)}

    def run(*inputs):
        return operator.run(**{**arguments, **dict(zip(tensors, inputs))})

    assert torch.autograd.gradcheck(run, list(tensors.values()), fast_mode=True)


@cases
def test_only_the_gradients_asked_for(name, settings):
    operator = OPERATORS[name]
    arguments = operator.make(channels=18, height=18, width=21, **settings)
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(operator.plain, arguments, grad_output)
    tensors = [each for each, value in arguments.items() if isinstance(value, Tensor)]
    for wanted in filter(None, (*((each,) for each in tensors), ('x', tensors[-1]), tuple(tensors[1:]))):
        got = with_gradients(operator.run, arguments, grad_output, wanted)
        assert set(got) == {'output', *wanted}
        for each, value in got.items():
            assert relative_error(value, expected[each]) < 1e-11, (wanted, each)


@pytest.mark.parametrize('kernel_size', [3, 7])
@pytest.mark.parametrize('mask', [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str)
def test_the_backward_computes_what_is_asked(kernel_size, mask):
    arguments = make_convolution(kernel_size=kernel_size)
    out = torch.ops.overlock_mm._depthwise_conv2d_backward(
        torch.randn_like(arguments['x']), arguments['x'], arguments['weight'], 1, False, list(map(bool, mask))
    )
    assert [value is not None and value.numel() > 0 for value in out] == list(map(bool, mask))


@pytest.mark.parametrize('name', ['convolution', 'residual', 'gelu', 'gelu_norm', 'response_norm', 'branches'])
def test_keeps_its_input_only(name):
    """The output lives too, because the caller holds it."""
    operator = OPERATORS[name]
    arguments = to(operator.make(batch=1, channels=16, height=60, width=60), torch.float32)
    arguments = {
        each: LAYOUTS['channels_last'](value).requires_grad_() if isinstance(value, Tensor) and value.ndim == 4 else value
        for each, value in arguments.items()
    }
    with KeptBytes() as storages:
        out = operator.run(**arguments)
        assert storages.count() <= out.nbytes * 1.1


@pytest.mark.skipif(not hasattr(torch._C, '_is_cow_tensor'), reason='this torch has no copy-on-write tensors')
@cases
def test_inputs_are_not_copied_on_reading(name, settings):
    """A tensor that is copied on writing still shares its memory after a forward and a backward have read it."""
    operator = OPERATORS[name]
    arguments = operator.make(**settings)
    arguments['x'] = LAYOUTS['channels_last'](arguments['x'])
    lazy = {each: torch._lazy_clone(x) if isinstance(x, Tensor) else x for each, x in arguments.items()}
    with_gradients(operator.run, lazy, arguments['x'])
    with torch.no_grad():
        operator.run(**lazy)
    assert [each for each, x in lazy.items() if isinstance(x, Tensor) and not torch._C._is_cow_tensor(x)] == []


@instruction_sets
def test_every_instruction_set(capability, instruction_set):
    """The same binary with the kernels of older processors, which torch's environment variable selects."""
    code = """
import sys
import torch
from test_depthwise import CASES, OPERATORS, check, check_bfloat16, check_gelu, check_layouts
failed = []
torch.manual_seed(0)
for name, settings in (*CASES, ('convolution', dict(kernel_size=31)), ('convolution', dict(kernel_size=13, dilation=2))):
    for channels in (3, 5, 8, 11, 20, 37):
        arguments = OPERATORS[name].make(channels=channels, height=17, width=23, **settings)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
            if dtype == torch.bfloat16 and name not in ('convolution', 'residual', 'gelu'):
                continue  # only kernels of convolutions read and write it
            try:
                check(name, arguments, dtype, tolerance, 'channels_last')
            except AssertionError as error:
                failed.append((name, settings, channels, dtype, str(error)[:100]))
check_gelu(torch.float32, 1.2e-6)
check_gelu(torch.float64, 1e-14)
check_layouts()
check_bfloat16()
for each in failed:
    print(*each, file=sys.stderr)
assert not failed, len(failed)
"""
    run_with_instruction_set(code, __file__, capability, instruction_set)


def check_layouts() -> None:
    """Maps go from one layout into the other and back without a change: through a kernel that copies."""
    copy = torch.zeros(3, 3, dtype=torch.float64)
    copy[1, 1] = 1
    for batch, channels, height, width in itertools.product((1, 3), (1, 5, 16, 63, 64, 80, 131), (1, 8, 13), (1, 16, 25)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = torch.randn(batch, channels, height, width).to(dtype)
            weight = copy.expand(channels, 1, 3, 3).to(dtype)
            out = torch.ops.overlock_mm.depthwise_conv2d(x, weight, None, 1, False)
            assert out.is_contiguous()
            assert torch.equal(out, x), (batch, channels, height, width, dtype)


class Namespaces(TorchDispatchMode):
    """Records the namespaces of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.namespace)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'channels, size, kernel_size, gradients, dtype, ours',
    [
        (4, 22, 3, False, torch.float32, True),
        (4, 22, 3, True, torch.float32, True),
        (4, 22, 9, False, torch.float32, True),
        (128, 22, 9, False, torch.float32, False),  # the map is small, the work is not
        (4, 23, 3, False, torch.float32, False),
        (4, 23, 3, True, torch.float32, False),
        (4, 23, 9, False, torch.float32, False),
        (4, 23, 11, False, torch.float32, not HAS_WIDE_KERNELS),
        (4, 23, 13, False, torch.float32, not HAS_WIDE_KERNELS),
        (4, 23, 5, True, torch.float32, True),
        (4, 23, 15, False, torch.float32, True),
        (4, 23, 3, False, torch.float64, True),
        (4, 23, 3, False, torch.float16, True),
        (4, 23, 3, False, torch.bfloat16, not HAS_FAST_BFLOAT16),
    ],
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN, and all is ours')
def test_who_runs_contiguous_maps(channels, size, kernel_size, gradients, dtype, ours):
    """PyTorch runs those of 512 positions and more, if its convolution is the faster one."""
    x = torch.randn(1, channels, size, size, dtype=dtype)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, dtype=dtype)
    with Namespaces() as namespaces, torch.set_grad_enabled(gradients):
        depthwise_conv2d(x, weight.requires_grad_(gradients))
    assert ('overlock_mm' in namespaces.seen) == ours


def check_bfloat16() -> None:
    """A product with one number is read from bfloat16 and rounded to it exactly as by torch's conversion."""
    for channels in (3, 16, 37, 64):
        x = torch.randn(2, channels, 33, 19).mul(10.0 ** torch.randint(-38, 38, (2, channels, 33, 19)))
        x[:, 1] = torch.nan
        x[:, 2] = torch.arange(33 * 19).view(33, 19) * 2.0**-133  # denormal
        x = x.bfloat16().contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(channels, 1, 3, 3)
        weight[:, :, 1, 1] = torch.randn(channels, 1)
        out = torch.ops.overlock_mm.depthwise_conv2d(x, weight, None, 1, False)
        expected = (x.float() * weight[:, :, 1, 1].view(1, -1, 1, 1)).bfloat16()
        assert torch.equal(out.nan_to_num(nan=7), expected.nan_to_num(nan=7)), channels
        assert out[:, 1].isnan().all()
        (grad, _, _) = torch.ops.overlock_mm._depthwise_conv2d_backward(x, x, weight, 1, False, [True, False, False])
        assert torch.equal(grad.nan_to_num(nan=7), expected.nan_to_num(nan=7)), channels


def test_bfloat16_is_read_and_written_as_by_torch():
    check_bfloat16()


@pytest.mark.parametrize('shape', [(3, 4), (196, 768), (64, 64), (2, 3, 65, 130), (1, 17), (0, 5), (2, 5, 0)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_transpose(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    out = torch.ops.overlock_mm.transpose(x)
    assert out.is_contiguous()
    assert torch.equal(out, x.transpose(-1, -2))
    assert out.shape == torch.ops.overlock_mm.transpose(x.to('meta')).shape


@pytest.mark.parametrize(
    'x, error, message',
    [
        (torch.zeros(3), ValueError, 'of 2 dimensions or more, got shape'),
        (torch.zeros(3, 4).t(), ValueError, 'matrices must be contiguous'),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, 'matrices must be float32 or float64, got'),
    ],
)
def test_transpose_refuses(x, error, message):
    for each in (x, x.to('meta')):
        with pytest.raises(error, match=message):
            torch.ops.overlock_mm.transpose(each)


def test_contiguous_maps_come_back_unchanged():
    check_layouts()


def check_gelu(dtype: torch.dtype, tolerance: float) -> None:
    """GELU and its derivative."""
    x = torch.linspace(-12, 12, 100001, dtype=torch.float64).to(dtype).requires_grad_()
    out = gelu(x)
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    (expected_slope,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    assert (out.detach().double() - expected.detach()).abs().max() < tolerance
    assert (slope.double() - expected_slope).abs().max() < tolerance


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1.2e-6), (torch.float64, 1e-14)], ids=str)
def test_gelu_is_accurate(dtype, tolerance):
    check_gelu(dtype, tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_gelu_of_huge_numbers(dtype):
    """Large numbers are copied, numbers far below 0 become 0, without an overflow. NaN stays NaN."""
    most = torch.finfo(dtype).max
    large = torch.tensor([20.0, 40.0, 1e3, 1e10, 1e19, 1e30, most / 2, most], dtype=dtype)
    x = torch.cat([large, -large, torch.full((1,), torch.nan, dtype=dtype)]).requires_grad_()
    out = gelu(x)
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    n = len(large)
    out = out.detach()
    assert torch.equal(out[:n], large)
    assert torch.equal(slope[:n], torch.ones_like(large))
    assert out[n : 2 * n].abs().max().item() < 1e-80
    assert slope[n : 2 * n].abs().max().item() < 1e-80
    assert out[-1].isnan()
    assert slope[-1].isnan()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'make',
    [
        lambda x: x[0, 0, 0],
        lambda x: x.flatten()[3],
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2, :, 1::3],
        lambda x: x[:, :1].expand(-1, 6, -1, -1),
        lambda x: x[:0],
    ],
    ids=['vector', 'number', 'transposed', 'strided', 'expanded', 'empty'],
)
def test_gelu_of_any_shape_and_layout(make, dtype):
    x = make(torch.randn(3, 4, 37, 131, dtype=dtype)).detach().requires_grad_()
    grad_output = make(torch.randn(3, 4, 37, 131, dtype=dtype))
    out = gelu(x)
    (grad,) = torch.autograd.grad(out, x, grad_output)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output.double())
    assert (out.dtype, out.shape, grad.dtype) == (dtype, x.shape, dtype)
    assert out.stride() == torch.empty_like(x).stride()
    tolerance = 4 * torch.finfo(dtype).eps
    for got, value in ((out, expected), (grad, expected_grad)):
        assert torch.allclose(got.detach().double(), value.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_scale_and_shift(dtype):
    x, scale, shift = random(2, 5, 6, 9).to(dtype), random(5), random(5, 1, 1, 1)
    out = scale_and_shift(x, scale, shift)
    expected = x * scale.to(dtype).view(5, 1, 1) + shift.to(dtype).view(5, 1, 1)
    assert out.dtype == dtype
    assert relative_error(out, expected) < 4 * torch.finfo(dtype).eps


@devices
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_scaled_sum(dtype, device):
    """Of channels of a larger map and another map, with the gradients of both."""
    whole, other = (random(2, channels, 6, 7).to(device, dtype) for channels in (9, 5))
    whole = whole.contiguous(memory_format=torch.channels_last)
    of_sums = torch.promote_types(dtype, torch.float32)
    parameters = [random(5, 1, 1, 1).to(device, of_sums) for _ in range(4)]
    inputs = [each.requires_grad_() for each in (whole, other, *parameters)]
    out = scaled_sum(whole[:, 2:7], *parameters[:2], other, *parameters[2:])
    scale, shift, other_scale, other_shift = (each.to(dtype).view(5, 1, 1) for each in parameters)
    expected = (whole[:, 2:7] * scale + shift) + (other * other_scale + other_shift)
    grad_output = torch.randn_like(out)
    assert out.dtype == dtype
    assert relative_error(out, expected) < 4 * torch.finfo(dtype).eps
    grads, expected_grads = (torch.autograd.grad(each, inputs, grad_output) for each in (out, expected))
    for got, value in zip(grads, expected_grads):
        assert got.dtype == value.dtype
        assert relative_error(got, value) < 16 * torch.finfo(dtype).eps


def bits_with_threads(function: Callable, numbers=(1, 2, 3)) -> list[dict]:
    before, results = torch.get_num_threads(), []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


SHAPES = [
    dict(batch=1, channels=1, height=250, width=200),
    dict(batch=2, channels=37, height=39, width=46),
    dict(batch=1, channels=37, height=64, width=40),
    dict(batch=3, channels=113, height=33, width=20),
    dict(batch=1, channels=1030, height=9, width=8),
    dict(batch=3, channels=8, height=20, width=21),  # fewer blocks of channels than threads
    dict(batch=1, channels=208, height=40, width=12),
]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@cases
def test_numbers_of_threads_give_the_same_bits(name, settings, dtype, shape):
    operator = OPERATORS[name]
    arguments = to(operator.make(**shape, **settings), dtype)
    arguments['x'] = LAYOUTS['channels_last'](arguments['x'])
    if shape['channels'] == 1 and (name, settings) == CASES[0]:
        pytest.skip('a map of one channel is contiguous, and this convolution of one is left to PyTorch')
    grad_output = torch.randn_like(arguments['x'])

    def run():
        with torch.no_grad():
            inference = operator.run(**arguments)
        return dict(inference=inference, **with_gradients(operator.run, arguments, grad_output))

    first, *others = bits_with_threads(run)
    for other in others:
        assert [each for each in first if not torch.equal(first[each], other[each])] == []


@operators
def test_repeats_itself_to_the_bit(name):
    operator = OPERATORS[name]
    arguments = to(operator.make(channels=37, height=30, width=45), torch.float32)
    grad_output = torch.randn_like(arguments['x'])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(operator.run, arguments, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[each], second[each]) for each in first)


def operator_arguments(name: str, dtype=torch.float32, layout='contiguous') -> list:
    """Arguments of an operator in ``torch.ops.overlock_mm``."""
    arguments = to(make_branches() if 'branch' in name else make_norm(), dtype)
    x = LAYOUTS[layout](arguments['x'])
    grad_output = LAYOUTS[layout](torch.randn_like(x))
    if 'branch' in name:
        dilations = arguments['dilations']
        weights, norm_weights, norm_biases = lists_of(dilations, arguments)
        inputs = [x, weights, norm_weights, norm_biases, dilations, 1e-5]
        if name == 'branch_norms':
            return inputs
        _, mean, variance = torch.ops.overlock_mm.branch_norms(*inputs)
        return {
            '_branch_norms_backward': [grad_output, x, weights, norm_weights, mean, variance, dilations, 1e-5],
            '_branch_statistics': [x, weights, dilations],
            '_branch_norms_given': [x, weights, norm_weights, norm_biases, mean, variance, dilations, 1e-5],
            '_branch_norms_sums': [grad_output, x, weights, mean, dilations],
            '_branch_norms_gradients': [
                grad_output, x, weights, norm_weights, mean, variance, mean[0], variance, dilations, 1e-5,
            ],
        }[name]  # fmt: skip
    weight, bias, gamma, beta = (arguments[each] for each in ('weight', 'bias', 'gamma', 'beta'))
    if name == 'depthwise_conv2d':
        return [x, weight, bias, 1, True]
    if name == '_depthwise_conv2d_backward':
        return [grad_output, x, weight, 1, True, [True, False, True]]
    if name.startswith('residual_depthwise_norm'):
        return [x, weight, bias, gamma, beta, 1e-6]
    if name == '_gelu_residual_depthwise_norm_backward':
        inputs = [x, weight, bias, gamma]
        response = torch.ops.overlock_mm._gelu_residual_depthwise_norm(*inputs, beta, 1e-6)[2]
        return [grad_output, *inputs, response, 1e-6]
    if name.endswith('gelu_residual_depthwise_norm'):
        return [x, weight, bias, gamma, beta, 1e-6]
    if name == 'gelu':
        return [x]
    if name == '_gelu_backward':
        return [grad_output, x]
    if name == 'transpose':
        return [x.contiguous().to(x.dtype if x.dtype == torch.float64 else torch.float32)]
    if name == '_response_norm_backward':
        return [grad_output, x, gamma, torch.ops.overlock_mm._response_norm(x, gamma, beta, 1e-6)[2], 1e-6]
    if name == '_response_normed':
        return [x, torch.ops.overlock_mm.global_response_norm(x, gamma, beta, 1e-6)[1], beta]
    if name == '_gelu_residual_depthwise_normed':
        scale = torch.ops.overlock_mm.gelu_residual_depthwise_norm(x, weight, bias, gamma, beta, 1e-6)[1]
        return [x, weight, bias, scale, beta]
    return [x, gamma, beta, 1e-6]


FORWARDS = ['depthwise_conv2d', 'gelu', 'gelu_residual_depthwise_norm', 'branch_norms', 'global_response_norm']
BACKWARDS = [
    '_depthwise_conv2d_backward',
    '_gelu_backward',
    '_gelu_residual_depthwise_norm_backward',
    '_branch_norms_backward',
    '_response_norm_backward',
]
FOR_INFERENCE = ['residual_depthwise_norm', 'residual_depthwise_norm_']
INTERNAL = [
    '_gelu_residual_depthwise_norm',
    '_gelu_residual_depthwise_normed',
    '_response_norm',
    '_response_normed',
    '_branch_statistics',
    '_branch_norms_given',
    '_branch_norms_sums',
    '_branch_norms_gradients',
]


@pytest.mark.skipif(TORCH < (2, 4), reason='torch < 2.4 has no torch.library.opcheck')
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice of channels_last', 'transposed'])
@pytest.mark.parametrize('name', [*FORWARDS, *BACKWARDS, *FOR_INFERENCE, *INTERNAL, 'transpose'])
def test_opcheck(name, layout):
    inputs = operator_arguments(name, layout=layout)
    torch.library.opcheck(getattr(torch.ops.overlock_mm, name).default, inputs)
    if name in FORWARDS:
        inputs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), inputs)
        checks = ['test_schema', 'test_faketensor', 'test_autograd_registration']
        if name != 'branch_norms':  # it has outputs without a gradient
            checks.append('test_aot_dispatch_dynamic')
        torch.library.opcheck(getattr(torch.ops.overlock_mm, name).default, inputs, test_utils=checks)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', [*FORWARDS, *BACKWARDS, *INTERNAL, 'residual_depthwise_norm'])
def test_meta_has_the_layout_of_the_real_one(name, layout, dtype):
    inputs = operator_arguments(name, dtype, layout)
    on_meta = tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta'), inputs
    )
    operator = getattr(torch.ops.overlock_mm, name)
    real, meta = operator(*inputs), operator(*on_meta)
    for x, y in zip(*((each,) if isinstance(each, Tensor) else each for each in (real, meta))):
        if x is None or not x.numel():
            assert y is None or not y.numel()
        else:
            assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


#: By operators that give their scale: those that make the output from it.
NORMED = {
    'global_response_norm': '_response_normed',
    'gelu_residual_depthwise_norm': '_gelu_residual_depthwise_normed',
}
normed = pytest.mark.parametrize('name', NORMED)


def normed_arguments(name: str, inputs: list, scale: Tensor) -> list:
    """Those of NORMED[name]: the scale takes the place of gamma, and there is no eps."""
    *inputs, _, beta, _ = inputs
    return [*inputs, scale, beta]


@normed
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [dict(), dict(batch=1, channels=20, height=40, width=33)], ids=str)
def test_a_norm_gives_the_same_bits_from_its_scale(name, dtype, layout, shape):
    arguments = to(make_norm(**shape), dtype)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    x, weight, bias, gamma, beta = arguments.values()
    inputs = [x, gamma, beta, 1e-6] if name == 'global_response_norm' else [x, weight, bias, gamma, beta, 1e-6]
    output, scale = getattr(torch.ops.overlock_mm, name)(*inputs)
    again = getattr(torch.ops.overlock_mm, NORMED[name])(*normed_arguments(name, inputs, scale))
    assert torch.equal(again, output)
    assert again.stride() == output.stride()

    exact = tree_map_only(Tensor, Tensor.double, inputs)
    u = exact[0] if name == 'global_response_norm' else plain_residual(F.gelu(exact[0]), *exact[1:3])
    response = u.square().sum((2, 3)).sqrt()
    expected = exact[-3] * response / (response.mean(1, keepdim=True) + 1e-6) + 1
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(scale, expected) < {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 4e-3)


@normed
def test_the_references_of_norms_from_their_scale(name):
    inputs = operator_arguments(name, torch.float64)
    expected = getattr(torch.ops.overlock_mm, name)(*inputs)
    for functions in (_library.references, _library.fallbacks):
        output, scale = functions[name](*inputs)
        assert relative_error(output, expected[0]) < 1e-12 and relative_error(scale, expected[1]) < 1e-12
        assert torch.equal(functions[NORMED[name]](*normed_arguments(name, inputs, scale)), output)


@normed
def test_a_scale_has_no_gradient(name):
    inputs = tree_map_only(Tensor, Tensor.requires_grad_, operator_arguments(name))
    for function in (getattr(torch.ops.overlock_mm, name), _library.references[name], _library.fallbacks[name]):
        output, scale = function(*inputs)
        assert output.requires_grad and not scale.requires_grad


@normed
def test_scales_are_checked(name):
    inputs = operator_arguments(name)
    arguments = normed_arguments(name, inputs, torch.ones(2, 4))
    for function in (getattr(torch.ops.overlock_mm, NORMED[name]), _library.references[NORMED[name]]):
        with pytest.raises(ValueError, match=r'scale must have shape \(2, 5\), got \(2, 4\)'):
            function(*arguments)


@cases
def test_torch_compile(name, settings):
    """The graph is one, contains the compiled operator, and is right for other sizes too. GELU is the compiler's."""
    operator = OPERATORS[name]
    calls = []

    def backend(module, inputs):
        calls.extend(str(node.target) for node in module.graph.nodes if node.op == 'call_function')
        return module.forward

    torch._dynamo.reset()
    arguments = operator.make(**settings)
    arguments['x'] = LAYOUTS['channels_last'](arguments['x'])  # some contiguous maps are left to PyTorch
    grad_output = torch.randn_like(arguments['x'])
    with_gradients(torch.compile(operator.run, fullgraph=True, backend=backend), arguments, grad_output)
    assert any('overlock_mm' in call for call in calls) == (name != 'gelu')
    torch._dynamo.reset()
    compiled = torch.compile(operator.run, fullgraph=True, dynamic=True, backend='aot_eager')
    for shape in (dict(), dict(batch=3, height=11, width=7)):
        arguments = operator.make(**shape, **settings)
        grad_output = torch.randn_like(arguments['x'])
        expected = with_gradients(operator.plain, arguments, grad_output)
        got = with_gradients(compiled, arguments, grad_output)
        assert max(errors(got, expected, grad_output.norm().item()).values()) < 1e-12
        with torch.no_grad():
            assert relative_error(compiled(**arguments), expected['output']) < 1e-12


@pytest.mark.skipif(TORCH < (2, 7), reason='torch < 2.7 does not say that it exports')
@pytest.mark.parametrize('name', OPERATORS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_a_graph_for_elsewhere_has_no_compiled_operator(name, layout):
    operator = OPERATORS[name]
    arguments = to(operator.make(), torch.float32)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    names = [each for each, value in arguments.items() if isinstance(value, Tensor)]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return operator.run(**{**arguments, **dict(zip(names, tensors))})

    tensors = tuple(arguments[each] for each in names)
    expected = operator.plain(**to(arguments, torch.float64))
    for graph_of_inference in (False, True):
        with torch.set_grad_enabled(not graph_of_inference):
            exported = torch.export.export(Module(), tensors)
            traced = torch.jit.trace(Module(), tensors, check_trace=False)
        assert not any('overlock_mm' in str(node.target) for node in exported.graph.nodes)
        assert not any('overlock_mm' in node.kind() for node in traced.inlined_graph.nodes())
        assert relative_error(exported.module()(*tensors), expected) < 2e-6
        assert relative_error(traced(*tensors), expected) < 2e-6


def test_without_the_binary(tmp_path):
    """The same operators under the same names, by their references."""
    run_without_binary(
        """
from test_depthwise import CASES, OPERATORS, check, make_norm, residual_depthwise_norm
from overlock_mm.ops import _library
assert _library.missing == 'overlock_mm was installed without its compiled operators'
torch.manual_seed(0)
for name, settings in CASES:
    for layout in ('contiguous', 'channels_last'):
        check(name, OPERATORS[name].make(**settings), torch.float64, 1e-12, layout)
arguments = make_norm()
with torch.no_grad():
    expected = residual_depthwise_norm(**arguments)
    assert residual_depthwise_norm(**arguments, inplace=True) is arguments['x']
assert torch.equal(arguments['x'], expected)
matrices = torch.randn(3, 4, 5)
assert torch.ops.overlock_mm.transpose(matrices).is_contiguous()
assert torch.equal(torch.ops.overlock_mm.transpose(matrices), matrices.transpose(1, 2))
""",
        tmp_path,
    )


def test_schemas_are_the_same_without_the_binary():
    for name, schema in _library.SCHEMAS.items():
        of_binary = torch._C.parse_schema(str(getattr(torch.ops.overlock_mm, name).default._schema))
        assert str(of_binary) == str(torch._C.parse_schema(f'overlock_mm::{name}{schema}'))


#: Of OPERATORS, those with kernels for CUDA.
WITH_CUDA_KERNELS = {'convolution', 'residual', 'norm', 'response_norm', 'gelu_norm', 'branches'}


@pytest.mark.skipif(torch.version.cuda is None, reason='this torch has no device cuda')
@operators
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_gpus_run_their_kernels_or_the_references(name, layout):
    """With tensors that have no data: no GPU is needed."""
    operator = OPERATORS[name]
    with FakeTensorMode():
        arguments = to(operator.make(), torch.float32)
        arguments = {key: x.to('cuda').requires_grad_() if isinstance(x, Tensor) else x for key, x in arguments.items()}
        arguments['x'] = LAYOUTS[layout](arguments['x'].detach()).requires_grad_()
        with Namespaces() as namespaces:
            out = operator.run(**arguments)
            with torch.no_grad():
                inference = operator.run(**arguments)
    has_kernels = has_cuda_kernels() and name in WITH_CUDA_KERNELS
    assert namespaces.seen - {'aten', 'prim', 'prims'} == ({'overlock_mm'} if has_kernels else set())
    assert out.requires_grad
    for each in (out, inference):
        assert (each.device, each.stride()) == (arguments['x'].device, arguments['x'].stride())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str)
def test_branch_norms_of_other_devices(dtype, tolerance):
    """The backward computes outputs of branches again, except the first, which is kept. The gradients are right."""
    arguments = make_branches(batch=2, channels=16, height=20, width=20)
    dilations = arguments['dilations']
    tensors = {
        key: x
        for key, x in to(arguments, torch.float32 if dtype == torch.bfloat16 else dtype).items()
        if key != 'dilations'
    }
    tensors['x'] = tensors['x'].to(dtype)

    def run(x, **parameters):
        return _library.fallbacks['branch_norms'](x, *lists_of(dilations, parameters), dilations, 1e-5)[0]

    def plain(x, **parameters):
        return plain_branches(x, dilations, **parameters)

    grad_output = torch.randn_like(tensors['x'])
    expected = with_gradients(plain, to(tensors, torch.float64), grad_output.double())
    got = with_gradients(run, tensors, grad_output)
    assert max(errors(got, expected, 0.1 * grad_output.double().norm().item()).values()) < tolerance
    assert all(got[key].dtype == x.dtype for key, x in tensors.items())

    leaves = {key: x.requires_grad_() for key, x in tensors.items()}
    with KeptBytes() as storages:
        out = run(**leaves)
        assert storages.count() <= 2.1 * out.nbytes  # the output, and that of the first branch


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str)
def test_gelu_norm_of_other_devices(dtype, tolerance, bias):
    """The backward keeps x and runs the layers again. The gradients are right, all of them and those of some."""
    arguments = make_norm(channels=16, height=20, width=20, bias=bias)
    tensors = to(arguments, torch.float32 if dtype == torch.bfloat16 else dtype)
    tensors['x'] = tensors['x'].to(dtype)

    def run(**tensors):
        return _library.fallbacks['gelu_residual_depthwise_norm'](**tensors, eps=1e-6)[0]

    grad_output = torch.randn_like(tensors['x'])
    expected = with_gradients(plain_gelu_norm, to(tensors, torch.float64), grad_output.double())
    least = 0.1 * grad_output.double().norm().item()
    for wanted in (None, ('x',), ('weight', 'beta')):
        got = with_gradients(run, tensors, grad_output, wanted)
        assert max(errors(got, {each: expected[each] for each in got}, least).values()) < tolerance
        assert all(got[key].dtype == tensors[key].dtype for key in got if key != 'output')

    leaves = {key: x if x is None else x.requires_grad_() for key, x in tensors.items()}
    with KeptBytes() as storages:
        out = run(**leaves)
        assert storages.count() <= 1.1 * out.nbytes


class Functions(TorchFunctionMode):
    """Records the calls of functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'name, operator',
    [
        ('convolution', 'depthwise_conv2d'),
        ('residual', 'depthwise_conv2d'),
        ('gelu', 'gelu'),
        ('gelu_norm', 'gelu_residual_depthwise_norm'),
        ('response_norm', 'global_response_norm'),
        ('branches', 'branch_norms'),
    ],
)
def test_function_modes_see_the_operators(name, operator):
    arguments = OPERATORS[name].make()
    with Functions() as functions:
        OPERATORS[name].run(**arguments)
    (args,) = (args for function, args in functions.calls if function is getattr(torch.ops.overlock_mm, operator).default)
    assert args[0] is arguments['x']


@operators
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_use_references(name, layout):
    operator = OPERATORS[name]
    arguments = operator.make()
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(operator.plain, arguments, grad_output)
    with use_references(), Namespaces() as namespaces:
        got = with_gradients(operator.run, arguments, grad_output)
        with torch.no_grad():
            inference = operator.run(**arguments)
    assert 'overlock_mm' not in namespaces.seen
    assert max(errors(got, expected, 1e-3).values()) < 1e-12
    assert relative_error(inference, expected['output']) < 1e-12
    assert inference.stride() == arguments['x'].stride()
    if layout == 'channels_last':
        with Namespaces() as namespaces:
            operator.run(**arguments)
        assert 'overlock_mm' in namespaces.seen


def test_use_references_is_for_its_own_thread():
    arguments = make_convolution(kernel_size=5)
    arguments['x'] = LAYOUTS['channels_last'](arguments['x'])

    def namespaces_of_a_call(_=None):
        with Namespaces() as namespaces:
            depthwise_conv2d(**arguments)
        return namespaces.seen

    with use_references(), ThreadPoolExecutor(1) as other_thread:
        assert 'overlock_mm' in other_thread.submit(namespaces_of_a_call).result()
        assert 'overlock_mm' not in namespaces_of_a_call()


def test_plain_branch_norms_keep_every_output():
    arguments = to(make_branches(channels=16, height=20, width=20), torch.float32)
    arguments = {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in arguments.items()}
    with use_references(), KeptBytes() as storages:
        out = compiled_branches(**arguments)
        assert storages.count() >= 4 * out.nbytes  # the output, and those of three convolutions


@autocast_dtypes
@cases
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_autocast(dtype, name, settings, layout):
    """Maps are cast, parameters are not rounded, and a gradient has the dtype of its tensor."""
    operator = OPERATORS[name]
    arguments = to(operator.make(channels=18, height=12, width=13, **settings), torch.float32)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    grad_output = torch.randn_like(arguments['x'])
    expected = with_gradients(operator.plain, to(arguments, torch.float64), grad_output)
    with torch.autocast('cpu', dtype=dtype):
        got = with_gradients(operator.run, arguments, grad_output)
        with torch.no_grad():
            inference = operator.run(**arguments)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for each, error in errors(got, expected, 0.1 * grad_output.norm().item()).items():
        assert error < tolerance, (each, error)
    for out in (got['output'], inference):
        assert out.dtype == (torch.float32 if name in ('gelu', 'response_norm') else dtype)
        assert relative_error(out, expected['output']) < tolerance
    assert all(got[each].dtype == torch.float32 for each in got if each != 'output')


@cases
def test_autocast_leaves_double_alone(name, settings):
    operator = OPERATORS[name]
    arguments = operator.make(**settings)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = operator.run(**arguments)
    assert out.dtype == torch.float64
    assert relative_error(out, operator.plain(**arguments)) < 1e-12


@cases
def test_inference_mode(name, settings):
    operator = OPERATORS[name]
    arguments = operator.make(channels=20, **settings)
    expected = operator.plain(**arguments)
    with torch.inference_mode():
        assert relative_error(operator.run(**arguments), expected) < 1e-12


@cases
def test_empty_batch(name, settings):
    operator = OPERATORS[name]
    arguments = operator.make(batch=0, **settings)
    if name == 'branches':
        with pytest.raises(ValueError, match=r'must have more than one value for each channel, got shape \(0, 5, 6, 9\)'):
            operator.run(**arguments)
        return
    got = with_gradients(operator.run, arguments, arguments['x'])
    assert got['output'].shape == got['x'].shape == (0, 5, 6, 9)
    assert all(not value.any() and value.shape == arguments[each].shape for each, value in got.items() if each != 'output')
    with torch.no_grad():
        assert operator.run(**arguments).shape == (0, 5, 6, 9)


@cases
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('channels', [3, 20])
def test_nan_spreads_as_in_plain_operators(name, settings, dtype, channels):
    """From a map: to its window and its channel. From grad_output: the same, and to its channel's parameters."""
    operator = OPERATORS[name]
    arguments = to(operator.make(channels=channels, height=12, width=30, **settings), dtype)
    grad_output = torch.randn_like(arguments['x'])
    broken = arguments['x'].clone()
    broken[0, 1, 5, 14] = torch.nan
    broken_grad = grad_output.clone()
    broken_grad[0, 1, 5, 14] = torch.nan
    for x, grad in ((broken, grad_output), (arguments['x'], broken_grad)):
        for layout in ('contiguous', 'channels_last'):
            inputs = {**arguments, 'x': LAYOUTS[layout](x)}
            got = with_gradients(operator.run, inputs, grad)
            expected = with_gradients(operator.plain, to(inputs, torch.float64), grad)
            for each, value in got.items():
                assert torch.equal(value.isnan(), expected[each].isnan()), each
            with torch.no_grad():
                assert torch.equal(operator.run(**inputs).isnan(), expected['output'].isnan())


@cases
@pytest.mark.parametrize('channels', [3, 20])
def test_nan_in_a_kernel_stays_in_its_channel(name, settings, channels):
    operator = OPERATORS[name]
    arguments = to(operator.make(channels=channels, height=12, width=30, **settings), torch.float32)
    if name in ('gelu', 'response_norm', 'norm', 'gelu_norm'):
        pytest.skip('there is no kernel, or the norm goes over the channels')
    weight = 'weight1' if name == 'branches' else 'weight'
    arguments[weight][1, 0, 0, 0] = torch.nan
    got = with_gradients(operator.run, arguments, torch.randn_like(arguments['x']))
    for value in (got['output'], got['x']):
        assert value[:, 0].isfinite().all()
        assert value[:, 2:].isfinite().all()
        assert value[:, 1].isnan().any()


@pytest.mark.parametrize(
    'shape', [dict(), dict(batch=1, channels=20, height=40, width=33), dict(channels=3, height=13, width=9)], ids=str
)
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-6)], ids=str
)
def test_statistics_of_branches(shape, dtype, tolerance):
    arguments = to(make_branches(**shape), dtype)
    dilations = arguments['dilations']
    for each in ('x', *(f'weight{i}' for i in range(len(dilations)))):
        arguments[each].requires_grad_()
    _, mean, variance = all_of_branches(**arguments)
    assert not mean.requires_grad
    assert not variance.requires_grad
    assert mean.dtype == variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights = lists_of(dilations, arguments)[0]
    for i, (weight, dilation) in enumerate(zip(weights, dilations)):
        y = plain_convolution(arguments['x'].double(), weight.double(), None, dilation).detach()
        assert relative_error(variance[i], y.var(dim=(0, 2, 3), unbiased=False)) < tolerance
        assert (mean[i].double() - y.mean(dim=(0, 2, 3))).abs().max() < tolerance * y.abs().max()


@pytest.mark.parametrize('kernels', ['positive', 'random', 'identity'])
@pytest.mark.parametrize(
    'shape', [dict(batch=4, channels=20, height=14, width=14), dict(channels=37, height=100, width=90)]
)
def test_large_means_and_small_variances(kernels, shape):
    """A map of mean 1e3 and deviation 1 in float32: plain sums of squares would have no digit left."""
    arguments = make_branches(**shape, branches=((5, 1), (1, 1), (3, 2)))
    arguments['x'] = (1e3 + arguments['x']).float()
    for i in range(3):
        weight = arguments[f'weight{i}']
        if kernels == 'positive':
            weight = weight.abs()
        elif kernels == 'identity':
            weight = torch.zeros_like(weight)
            weight[..., weight.shape[-1] // 2, weight.shape[-1] // 2] = 1
        arguments[f'weight{i}'] = weight
    arguments = to(arguments, torch.float32)
    dilations = arguments['dilations']
    _, mean, variance = all_of_branches(**arguments)
    weights = lists_of(dilations, arguments)[0]
    for i, (weight, dilation) in enumerate(zip(weights, dilations)):
        y = plain_convolution(arguments['x'].double(), weight.double(), None, dilation)
        expected = y.var(dim=(0, 2, 3), unbiased=False)
        plain = plain_convolution(arguments['x'], weight, None, dilation)
        of_torch = ((plain.var(dim=(0, 2, 3), unbiased=False).double() - expected) / expected).abs().max().item()
        assert ((variance[i].double() - expected) / expected).abs().max() < max(1e-3, 2 * of_torch), i
        assert relative_error(mean[i], y.mean(dim=(0, 2, 3))) < 1e-6
    # PyTorch also loses the digits that are lost before the norm.
    expected = plain_branches(**to(arguments, torch.float64))
    error = relative_error(compiled_branches(**arguments), expected)
    assert error < max(2e-6, 4 * relative_error(plain_branches(**arguments), expected))


@cases
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_second_derivatives_are_refused(name, settings, layout):
    """An error, not a wrong result. Where PyTorch's convolution runs, they are right."""
    operator = OPERATORS[name]
    arguments = operator.make(**settings)
    arguments['x'] = LAYOUTS[layout](arguments['x'])
    tensors = {each: value.requires_grad_() for each, value in arguments.items() if isinstance(value, Tensor)}

    def second(function, asked):
        (grad,) = torch.autograd.grad(function(**arguments).pow(2).sum(), tensors[asked], create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), tensors['x'])[0]

    for asked in tensors:
        try:
            got = second(operator.run, asked)
        except RuntimeError as error:
            assert re.search(r'no second derivative(.|\n)*with overlock_mm.ops.use_references\(\)', str(error))
        else:
            assert (name, layout) == ('convolution', 'contiguous')
            assert relative_error(got, second(operator.plain, asked)) < 1e-12


def replaced(**changes: Callable) -> Callable:
    return lambda arguments: {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}


def call_branches(x, weights, norm_weights, norm_biases, dilations):
    return branch_norms(x, weights, norm_weights, norm_biases, dilations)


def make_lists() -> dict:
    arguments = make_branches()
    lists = zip(('weights', 'norm_weights', 'norm_biases'), lists_of(arguments['dilations'], arguments))
    return dict(x=arguments['x'], **dict(lists), dilations=arguments['dilations'])


CONVOLUTION = (depthwise_conv2d, lambda: make_convolution(dilation=1))
RESIDUAL = (residual_depthwise_conv2d, make_convolution)
MIXED_NORM = (residual_depthwise_norm, make_norm)
GELU_NORM = (gelu_residual_depthwise_norm, make_norm)
NORM = (global_response_norm, make_response_norm)
BRANCHES = (call_branches, make_lists)


# ruff: noqa: E501 (a table)
@pytest.mark.parametrize('path', ['compiled', 'with gradients', 'as fast in PyTorch'])
@pytest.mark.parametrize(
    'operator, change, error, message',
    [
        *(
            (operator, change, error, message)
            for operator in (CONVOLUTION, RESIDUAL, MIXED_NORM, GELU_NORM)
            for change, error, message in (
                (replaced(x=Tensor.tolist), TypeError, 'x must be a Tensor, got list'),
                (replaced(weight=Tensor.tolist), TypeError, 'weight must be a Tensor, got list'),
                (replaced(bias=lambda x: 1.0), TypeError, 'bias must be a Tensor or None, got float'),
                (replaced(x=lambda x: x[0]), ValueError, r'x must have 4 dimensions, got shape \(5, 6, 9\)'),
                (replaced(weight=lambda x: x[1:]), ValueError, r'weight must have shape \(5, 1, k, k\) with k odd, got \(4, 1, 3, 3\)'),
                (replaced(weight=lambda x: x[..., :2, :2]), ValueError, r'weight must have shape \(5, 1, k, k\) .* got \(5, 1, 2, 2\)'),
                (replaced(weight=lambda x: x[..., :2]), ValueError, r'weight must have shape \(5, 1, k, k\) .* got \(5, 1, 3, 2\)'),
                (replaced(weight=lambda x: x.sum()), ValueError, r'weight must have shape \(5, 1, k, k\) .* got \(\)'),
                (replaced(bias=lambda x: x[1:]), ValueError, r'bias must have shape \(5,\), got \(4,\)'),
                (replaced(bias=lambda x: x[None]), ValueError, r'bias must have shape \(5,\), got \(1, 5\)'),
                (replaced(x=lambda x: x.int()), TypeError, 'x must be float16, .* got torch.int32'),
                (replaced(weight=lambda x: x.float()), TypeError, 'weight must have dtype torch.float64.* got torch.float32'),
                (replaced(bias=lambda x: x.float()), TypeError, 'bias must have dtype torch.float64.* got torch.float32'),
                (replaced(weight=lambda x: x.to('meta')), ValueError, 'weight must be on the device of x, cpu, got meta'),
                (replaced(bias=lambda x: x.to('meta')), ValueError, 'bias must be on the device of x, cpu, got meta'),
            )
        ),
        (CONVOLUTION, replaced(dilation=lambda x: 0), ValueError, 'dilation must be an int of at least 1, got 0'),
        (CONVOLUTION, replaced(dilation=lambda x: True), ValueError, 'dilation must be an int of at least 1, got True'),
        (CONVOLUTION, replaced(dilation=lambda x: 1.5), ValueError, 'dilation must be an int of at least 1, got 1.5'),
        (CONVOLUTION, replaced(dilation=lambda x: 2**31), ValueError, 'dilation must be at most 2147483647, got 2147483648'),
        ((gelu, make_map), replaced(x=lambda x: x.int()), TypeError, 'x must be float16, bfloat16, float32 or float64, got torch.int32'),
        ((gelu, make_map), replaced(x=lambda x: None), TypeError, 'x must be a Tensor, got NoneType'),
        ((residual_depthwise_norm, lambda: dict(make_norm(), inplace=False)), replaced(inplace=lambda x: None), TypeError, 'inplace must be True or False, got None'),
        *(
            ((operator, lambda make=make: dict(make(), eps=1e-6)), replaced(eps=lambda x: '1e-6'), TypeError, "eps must be a number, got '1e-6'")
            for operator, make in (NORM, MIXED_NORM, GELU_NORM, (branch_norms, make_lists))
        ),
        *(
            (operator, replaced(weight=lambda x: x[..., :1, :1]), ValueError, r'weight must have shape \(5, 1, 3, 3\), got \(5, 1, 1, 1\)')
            for operator in (MIXED_NORM, GELU_NORM)
        ),
        *(
            (operator, change, error, message)
            for operator in (NORM, MIXED_NORM, GELU_NORM)
            for change, error, message in (
                (replaced(gamma=lambda x: x[1:]), ValueError, r'gamma must have shape .*5.* got \(4,\)'),
                (replaced(beta=lambda x: x[1:]), ValueError, r'beta must have shape .*5.* got \(4,\)'),
                (replaced(gamma=lambda x: x.float()), TypeError, 'gamma must have dtype torch.float64.* got torch.float32'),
                (replaced(beta=lambda x: x.float()), TypeError, 'beta must have dtype torch.float64.* got torch.float32'),
                (replaced(gamma=lambda x: x.to('meta')), ValueError, 'gamma must be on the device of x, cpu, got meta'),
            )
        ),
        (NORM, replaced(x=Tensor.tolist), TypeError, 'x must be a Tensor, got list'),
        (NORM, replaced(x=lambda x: x[0]), ValueError, r'x must have 4 dimensions, got shape \(5, 6, 9\)'),
        (NORM, replaced(x=lambda x: x.int()), TypeError, 'x must be float16, .* got torch.int32'),
        (BRANCHES, replaced(x=Tensor.tolist), TypeError, 'x must be a Tensor, got list'),
        (BRANCHES, replaced(x=lambda x: x[0]), ValueError, r'x must have 4 dimensions, got shape \(5, 6, 9\)'),
        (BRANCHES, replaced(weights=lambda x: [x[0], x[1][1:], x[2]]), ValueError, r'weight.* must have shape \(5, 1, k, k\) .* got \(4, 1, 3, 3\)'),
        (BRANCHES, replaced(weights=lambda x: [x[1], x[0], x[2]]), ValueError, r'the first branch must reach as far as any, got kernel sizes \[3, 5, 3\] and dilations \[1, 1, 2\]'),
        (BRANCHES, replaced(weights=lambda x: x[1:], norm_weights=lambda x: x[1:], norm_biases=lambda x: x[1:], dilations=lambda x: [2, 2]), ValueError, r'the first branch must have no dilation, got dilations \[2, 2\]'),
        (BRANCHES, replaced(dilations=lambda x: [1, 0, 2]), ValueError, 'dilations must be ints of at least 1, got 0'),
        (BRANCHES, replaced(dilations=lambda x: x[:2]), ValueError, r'dilations must be a number for each of 3 weights, got \[1, 1\]'),
        (BRANCHES, replaced(weights=lambda x: x[:2]), ValueError, r'dilations must be a number for each of 2 weights, got \[1, 1, 2\]'),
        (BRANCHES, replaced(dilations=lambda x: [1, 1, 2**31]), ValueError, 'dilations must be at most 2147483647, got 2147483648'),
        (BRANCHES, replaced(dilations=lambda x: 1), TypeError, 'dilations must be a sequence of ints, got int'),
        *(
            (BRANCHES, replaced(**{name: lambda x: None}), TypeError, f'{name} must be a sequence of tensors, got NoneType')
            for name in ('weights', 'norm_weights', 'norm_biases')
        ),
        (BRANCHES, replaced(x=lambda x: x[:1, :, :1, :1]), ValueError, r'x must have more than one value for each channel, got shape \(1, 5, 1, 1\)'),
        (BRANCHES, replaced(weights=lambda x: x[:1] * 9, norm_weights=lambda x: x[:1] * 9, norm_biases=lambda x: x[:1] * 9, dilations=lambda x: [1] * 9), ValueError, r'weights must be 1 to 8 kernels, got 9'),
        (BRANCHES, replaced(weights=lambda x: [], norm_weights=lambda x: [], norm_biases=lambda x: [], dilations=lambda x: []), ValueError, r'weights must be 1 to 8 kernels, got 0'),
        (BRANCHES, replaced(norm_weights=lambda x: x[:2]), ValueError, r'norm_weights must be a tensor for each of 3 weights, got 2'),
        (BRANCHES, replaced(norm_biases=lambda x: x[:2]), ValueError, r'norm_biases must be a tensor for each of 3 weights, got 2'),
        (BRANCHES, replaced(norm_biases=lambda x: [x[0], x[1][1:], x[2]]), ValueError, r'norm_biases must .* got .*\(4,\)'),
        (BRANCHES, replaced(norm_weights=lambda x: [each.float() for each in x]), TypeError, 'norm_weights must have dtype torch.float64.* got torch.float32'),
        (BRANCHES, replaced(weights=lambda x: [each.float() for each in x]), TypeError, 'weights must have dtype torch.float64.* got torch.float32'),
        (BRANCHES, replaced(x=lambda x: x.int()), TypeError, 'x must be float16, .* got torch.int32'),
    ],
)  # fmt: skip
def test_bad_arguments(operator, change, error, message, path):
    """On every path that the arguments may take."""
    function, make = operator
    arguments = make()
    if path == 'compiled':
        arguments['x'] = LAYOUTS['channels_last'](arguments['x'])
    elif path == 'with gradients':
        arguments = to(arguments, torch.float64)
        arguments['x'].requires_grad_()
    with torch.set_grad_enabled(path == 'with gradients'), pytest.raises(error) as raised:
        function(**change(arguments))
    assert re.search(message, str(raised.value))


@pytest.mark.parametrize('name', [*FORWARDS, *BACKWARDS, *FOR_INFERENCE])
def test_bad_operator_arguments(name):
    """Maps and grad_output, in every operator of the binary that has them."""
    inputs = operator_arguments(name)
    operator = getattr(torch.ops.overlock_mm, name)
    position = 1 if name in BACKWARDS else 0
    if name not in ('gelu', '_gelu_backward'):  # they take all shapes
        with pytest.raises(ValueError, match=r'must have 4 dimensions, got shape \(5, 6, 9\)'):
            operator(*inputs[:position], inputs[position][0], *inputs[position + 1 :])
    if name not in BACKWARDS:
        return
    for change, error, message in (
        (lambda x: x[:1], ValueError, r'grad_output must have the shape of x, \(2, 5, 6, 9\), got \(1, 5, 6, 9\)'),
        (lambda x: x.double(), TypeError, 'grad_output must have dtype torch.float32.* got torch.float64'),
        (lambda x: x.to('meta'), ValueError, 'grad_output must be on the device of'),
    ):
        with pytest.raises(error, match=message):
            operator(change(inputs[0]), *inputs[1:])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_inplace(layout, dtype):
    """The result overwrites x, and is the same to the last digit, also at the borders between strips of a map."""
    for batch, channels, height, width in ((1, 64, 70, 5), (2, 20, 37, 11), (3, 5, 3, 4), (1, 8, 1, 1), (2, 33, 200, 3)):
        arguments = to(make_norm(batch=batch, channels=channels, height=height, width=width), dtype)
        x = arguments['x'] = LAYOUTS[layout](arguments['x'])
        with torch.no_grad():
            expected = residual_depthwise_norm(**arguments)
            version = x._version
            out = residual_depthwise_norm(**arguments, inplace=True)
        assert out is x
        assert x._version > version
        assert torch.equal(out, expected)


def test_inplace_of_a_view_with_a_sign():
    """The imaginary part of a conjugated tensor has a sign that is not in memory."""
    for mode in (torch.no_grad, torch.inference_mode):
        arguments = to(make_norm(batch=1, channels=17, height=24, width=2), torch.float32)
        x = arguments['x'] = torch.complex(arguments['x'], -arguments['x']).conj().imag
        assert x.is_neg()
        with mode():
            expected = residual_depthwise_norm(**{**arguments, 'x': x.clone()})
            assert residual_depthwise_norm(**arguments, inplace=True) is x
        assert torch.equal(x, expected)


def test_inplace_is_refused_with_gradients_and_casts():
    arguments = make_norm()
    for name in arguments:
        with_gradient = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match='inplace must be False where a gradient is asked for, got True'):
            residual_depthwise_norm(**with_gradient, inplace=True)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        message = 'inplace must be False where autocast makes torch.bfloat16 of torch.float32, got True'
        with pytest.raises(ValueError, match=message):
            residual_depthwise_norm(**to(arguments, torch.float32), inplace=True)


def test_inplace_has_no_derivative():
    arguments = list(to(make_norm(), torch.float32).values())
    operator = torch.ops.overlock_mm.residual_depthwise_norm_
    with pytest.raises(NotImplementedError, match='derivative for overlock_mm::residual_depthwise_norm_'):
        operator(arguments[0], arguments[1].requires_grad_(), *arguments[2:], 1e-6)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(NotImplementedError, match='derivative for overlock_mm::residual_depthwise_norm_'):
            operator(x, *arguments[1:], 1e-6)


def test_inplace_under_inference_mode():
    """The version of a tensor that was made outside of the mode must change."""
    arguments = to(make_norm(), torch.float32)
    version = arguments['x']._version
    with torch.inference_mode():
        residual_depthwise_norm(**arguments, inplace=True)
    assert arguments['x']._version > version
