"""The ContMix operator against a gather-by-gather oracle in float64, and its contract."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from conftest import autocast_dtypes, devices, relative_error

from overlock_mm.ops import contmix, contmix_kernels, contmix_reference, use_references
from overlock_mm.ops._reference import aggregate

SIZES = dict(num_groups=2, small_kernel_size=3, large_kernel_size=5, scale=0.7)
IMPLEMENTATIONS = pytest.mark.parametrize('function', [contmix, contmix_reference], ids=['contmix', 'reference'])


def make_arguments(
    batch=2, height=6, width=9, per_group=3, query_per_group=2, tokens=3, dtype=torch.float64, device='cpu',
    num_groups=2, small_kernel_size=3, large_kernel_size=5,
):  # fmt: skip
    small, large, side = small_kernel_size, large_kernel_size, tokens

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    return dict(
        value=random(batch, 2 * num_groups * per_group, height, width),
        query=random(batch, num_groups * query_per_group, height, width),
        key=random(batch, num_groups * query_per_group, side, side),
        proj_weight=random(small**2 + large**2, side**2),
        proj_bias=random(small**2 + large**2),
        rpb_small=random(num_groups, 2 * small - 1, 2 * small - 1),
        rpb_large=random(num_groups, 2 * large - 1, 2 * large - 1),
        num_groups=num_groups,
        small_kernel_size=small,
        large_kernel_size=large,
        scale=0.7,
    )


def oracle(
    value, query, key, proj_weight, proj_bias, rpb_small, rpb_large, num_groups, small_kernel_size, large_kernel_size, scale
):
    """One position, group and neighbour at a time, in float64."""
    batch, channels, height, width = value.shape
    value, query, key, weight = value.double(), query.double(), key.double(), proj_weight.double()
    per_group, query_per_group = channels // 2 // num_groups, query.shape[1] // num_groups
    out = torch.zeros_like(value)
    first_slot = 0
    for branch, (k, rpb) in enumerate(((small_kernel_size, rpb_small), (large_kernel_size, rpb_large))):
        slots = slice(first_slot, first_slot + k * k)
        first_slot += k * k
        for b in range(batch):
            for g in range(num_groups):
                of_query = slice(g * query_per_group, (g + 1) * query_per_group)
                start = branch * channels // 2 + g * per_group
                of_value = slice(start, start + per_group)
                tokens = key[b, of_query].flatten(1)
                for y in range(height):
                    for x in range(width):
                        logits = weight[slots] @ (scale * tokens.T @ query[b, of_query, y, x])
                        if proj_bias is not None:
                            logits = logits + proj_bias[slots].double()
                        logits = logits.view(k, k)
                        top = min(max(y - k // 2, 0), height - k)
                        left = min(max(x - k // 2, 0), width - k)
                        if rpb is not None:
                            rows = slice(top - y + k - 1, top - y + 2 * k - 1)
                            columns = slice(left - x + k - 1, left - x + 2 * k - 1)
                            logits = logits + rpb[g, rows, columns].double()
                        kernel = logits.flatten().softmax(0).view(k, k)
                        window = value[b, of_value, top : top + k, left : left + k]
                        out[b, of_value, y, x] = (window * kernel).sum(dim=(1, 2))
    return out


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(batch=1, height=5, width=5),
        dict(height=5, width=23),
        dict(height=13, width=6, per_group=1, query_per_group=1),
        dict(height=8, width=7, per_group=5, query_per_group=3, tokens=7, num_groups=3),
        dict(height=9, width=8, small_kernel_size=1, large_kernel_size=7),
        dict(height=6, width=6, small_kernel_size=5, large_kernel_size=3),
    ],
    ids=str,
)
def test_equals_the_oracle(function, settings):
    arguments = make_arguments(**settings)
    assert relative_error(function(**arguments), oracle(**arguments)) < 1e-14
    for name in ('proj_bias', 'rpb_small', 'rpb_large'):
        without = {**arguments, name: None}
        assert relative_error(function(**without), oracle(**without)) < 1e-14


@devices
@IMPLEMENTATIONS
def test_devices(function, device):
    arguments = make_arguments(device=device, dtype=torch.float32)
    out = function(**arguments)
    assert out.device.type == device
    on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert relative_error(out.cpu(), oracle(**on_cpu)) < 1e-5


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str
)
def test_precision(function, dtype, tolerance):
    """Half types accumulate in float32: the only error is the rounding of the result."""
    arguments = make_arguments(dtype=dtype)
    out = function(**arguments)
    assert out.dtype == dtype
    assert relative_error(out, oracle(**arguments)) < tolerance
    if dtype not in (torch.float32, torch.float64):
        for name in ('proj_weight', 'proj_bias', 'rpb_small', 'rpb_large'):
            arguments[name] = torch.randn_like(arguments[name], dtype=torch.float32)
        assert relative_error(function(**arguments), oracle(**arguments)) < tolerance


@IMPLEMENTATIONS
def test_gradients(function):
    arguments = make_arguments(batch=1, height=5, width=6, per_group=1, query_per_group=2, tokens=2)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    tensors = [arguments[name].requires_grad_() for name in names]

    def run(*inputs):
        return function(**{**arguments, **dict(zip(names, inputs))})

    assert torch.autograd.gradcheck(run, tensors)


def test_the_reference_has_a_second_derivative():
    arguments = make_arguments(batch=1, height=3, width=3, per_group=1, query_per_group=1, tokens=1, large_kernel_size=3)
    names = ('value', 'query', 'key', 'rpb_large')

    def run(*inputs):
        return contmix_reference(**{**arguments, **dict(zip(names, inputs))})

    assert torch.autograd.gradgradcheck(run, [arguments[name].requires_grad_() for name in names])


def test_layouts():
    arguments = make_arguments()
    expected = contmix(**arguments)
    assert expected.is_contiguous()
    for name in ('value', 'query', 'key'):
        last = {**arguments, name: arguments[name].contiguous(memory_format=torch.channels_last)}
        out = contmix(**last)
        assert relative_error(out, expected) < 1e-15
        assert out.is_contiguous(memory_format=torch.channels_last if name == 'value' else torch.contiguous_format)
        strided = torch.empty(*arguments[name].shape[:3], 2 * arguments[name].shape[3], dtype=torch.float64)[..., ::2]
        strided.copy_(arguments[name])
        assert relative_error(contmix(**{**arguments, name: strided}), expected) < 1e-15


def test_empty_batch():
    assert contmix(**make_arguments(batch=0)).shape == (0, 12, 6, 9)


@autocast_dtypes
def test_autocast(dtype):
    """The caller casts nothing. Parameters are not rounded, and a gradient has the dtype of its tensor."""
    arguments = make_arguments(dtype=torch.float32)
    tensors = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with torch.autocast('cpu', dtype=dtype):
        out = contmix(**arguments)
    assert out.dtype == dtype
    rounded = {name: arguments[name].detach().to(dtype) for name in ('value', 'query', 'key')}
    assert torch.equal(out, contmix(**{**arguments, **rounded}))
    out.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_autocast_leaves_double_alone():
    arguments = make_arguments()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(contmix(**arguments), contmix(**arguments))
        assert contmix(**arguments).dtype == torch.float64


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_large_logits_stay_finite(dtype):
    """Logits around 1e4: a softmax that overflows gives NaN."""
    arguments = make_arguments(dtype=dtype)
    arguments['query'] = arguments['query'] * 1e3
    out = contmix(**arguments)
    assert out.isfinite().all()
    assert relative_error(out, oracle(**arguments)) < 5e-3


def test_minus_infinity_masks_its_slot():
    arguments = make_arguments()
    arguments['rpb_large'][:, 0, :] = -torch.inf
    out = contmix(**arguments)
    assert out.isfinite().all()
    assert relative_error(out, oracle(**arguments)) < 1e-14


def test_nan_gives_nan():
    arguments = make_arguments()
    arguments['query'][0, 0, 2, 3] = torch.nan
    out = contmix(**arguments)
    assert out[0, :3, 2, 3].isnan().all()
    assert out[1].isfinite().all()


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, value, query, key, proj_weight, proj_bias, rpb_small, rpb_large):
            return contmix_reference(value, query, key, proj_weight, proj_bias, rpb_small, rpb_large, **SIZES)

    arguments = make_arguments(dtype=torch.float32)
    tensors = tuple(value for value in arguments.values() if isinstance(value, torch.Tensor))
    exported = torch.export.export(Module(), tensors)
    assert relative_error(exported.module()(*tensors), Module()(*tensors)) < 1e-6


def replaced(name, change):
    return lambda arguments: {**arguments, name: change(arguments[name])}


@pytest.mark.parametrize(
    'change, error, message',
    [
        (replaced('value', lambda x: x.tolist()), TypeError, 'value must be a Tensor, got list'),
        (replaced('proj_bias', lambda x: 1.0), TypeError, 'proj_bias must be a Tensor or None, got float'),
        (replaced('num_groups', float), TypeError, 'num_groups must be an int, got 2.0'),
        (replaced('num_groups', lambda x: 0), ValueError, 'num_groups must be at least 1, got 0'),
        (replaced('num_groups', lambda x: 2**31), ValueError, 'num_groups must be at most 2147483647, got 2147483648'),
        (replaced('num_groups', lambda x: 5), ValueError, 'value must have channels divisible by .* 10, got 12'),
        (replaced('value', lambda x: x[0]), ValueError, r'value must have 4 dimensions, got shape \(12, 6, 9\)'),
        (replaced('value', lambda x: x.int()), TypeError, 'value must be float16, .* got torch.int32'),
        (replaced('value', lambda x: x.to('meta')), ValueError, 'query must be on the device of value, meta, got cpu'),
        (replaced('query', lambda x: x.float()), TypeError, 'query must have dtype torch.float64 .* got torch.float32'),
        (replaced('query', lambda x: x[:, :3]), ValueError, 'query must have channels divisible by num_groups = 2, got 3'),
        (replaced('query', lambda x: x[:, :, 1:]), ValueError, r'query must have the batch and map of value, \(2, \*, 6'),
        (replaced('key', lambda x: x[:1]), ValueError, r'key must have shape \(2, 4, S, S\), got \(1, 4, 3, 3\)'),
        (replaced('proj_weight', lambda x: x.float()), TypeError, 'proj_weight must have dtype torch.float64'),
        (replaced('proj_weight', lambda x: x[:, 1:]), ValueError, r'proj_weight must have shape \(34, 9\), got \(34, 8\)'),
        (replaced('proj_bias', lambda x: x[1:]), ValueError, r'proj_bias must have shape \(34,\), got \(33,\)'),
        (replaced('rpb_small', lambda x: x[:1]), ValueError, r'rpb_small must have shape \(2, 5, 5\), got \(1, 5, 5\)'),
        (replaced('rpb_large', lambda x: x[:, 1:]), ValueError, r'rpb_large must have shape \(2, 9, 9\), got \(2, 8, 9\)'),
        (replaced('query', lambda x: x[0]), ValueError, r'query must have 4 dimensions, got shape \(4, 6, 9\)'),
        (replaced('key', lambda x: x[0]), ValueError, r'key must have 4 dimensions, got shape \(4, 3, 3\)'),
        (replaced('key', lambda x: x.float()), TypeError, 'key must have dtype torch.float64 .* got torch.float32'),
        (replaced('proj_weight', lambda x: x[0]), ValueError, r'proj_weight must have 2 dimensions, got shape \(9,\)'),
        (replaced('proj_bias', lambda x: x.float()), TypeError, 'proj_bias must have dtype torch.float64'),
        (replaced('proj_bias', lambda x: x[None]), ValueError, r'proj_bias must have shape \(34,\), got \(1, 34\)'),
        (replaced('rpb_small', lambda x: x.half()), TypeError, 'rpb_small must have dtype torch.float64'),
        (replaced('rpb_large', lambda x: x[0]), ValueError, r'rpb_large must have shape \(2, 9, 9\), got \(9, 9\)'),
        *(
            (replaced(name, lambda x: x.to('meta')), ValueError, f'{name} must be on the device of value, cpu, got meta')
            for name in ('query', 'key', 'proj_weight', 'proj_bias', 'rpb_small', 'rpb_large')
        ),
        (replaced('large_kernel_size', lambda x: 0), ValueError, 'large_kernel_size must be at least 1, got 0'),
        (replaced('small_kernel_size', lambda x: 4), ValueError, 'small_kernel_size must be odd, got 4'),
        (replaced('large_kernel_size', lambda x: 7), ValueError, 'large_kernel_size must be at most .* 6, got 7'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'reference'])
def test_bad_arguments(change, error, message, compiled):
    """The compiled operator and the reference have the same checks."""
    with contextlib.nullcontext() if compiled else use_references(), pytest.raises(error) as raised:
        contmix(**change(make_arguments()))
    assert re.search(message, str(raised.value))


def test_half_beside_double_is_named():
    with pytest.raises(TypeError, match='proj_weight must have dtype torch.float16 or torch.float32 .* got torch.float64'):
        contmix(**{**make_arguments(dtype=torch.float16), 'proj_weight': make_arguments()['proj_weight']})


# The kernels by themselves.


def kernels_of(arguments):
    return contmix_kernels(**{name: value for name, value in arguments.items() if name != 'value'})


def mixed_by(kernels, value):
    """(B, C, H, W): the halves of the channels, each summed under its kernels."""
    halves = [half.unflatten(1, (kernels[0].shape[1], -1)) for half in value.chunk(2, dim=1)]
    return torch.cat([aggregate(half, each).flatten(1, 2) for half, each in zip(halves, kernels)], dim=1)


@pytest.mark.parametrize(
    'settings',
    [dict(), dict(height=5, width=23), dict(height=9, width=8, small_kernel_size=1, large_kernel_size=7, num_groups=3)],
    ids=str,
)
def test_kernels_are_those_of_contmix(settings):
    arguments = make_arguments(**settings)
    for name in (None, 'proj_bias', 'rpb_small', 'rpb_large'):
        changed = arguments if name is None else {**arguments, name: None}
        kernels = kernels_of(changed)
        assert relative_error(mixed_by(kernels, arguments['value']), contmix(**changed)) < 1e-14
        for each, size in zip(kernels, (arguments['small_kernel_size'], arguments['large_kernel_size'])):
            batch, _, height, width = arguments['value'].shape
            assert each.shape == (batch, arguments['num_groups'], height, width, size, size)
            assert (each >= 0).all()
            assert relative_error(each.sum(dim=(-2, -1)), torch.ones(each.shape[:-2])) < 1e-15


def test_slots_of_a_kernel_at_a_corner():
    """The window of the last position ends at the last row and column: its last slot is the position itself."""
    arguments = make_arguments()
    arguments['rpb_large'].fill_(-torch.inf)
    arguments['rpb_large'][:, 4, 4] = 0  # offset 0
    kernels = kernels_of(arguments)[1]
    for position, slot in (((5, 8), (4, 4)), ((0, 0), (0, 0)), ((3, 4), (2, 2))):
        expected = torch.zeros(5, 5, dtype=torch.float64)
        expected[slot] = 1
        assert torch.equal(kernels[:, :, position[0], position[1]], expected.expand(2, 2, 5, 5))


def test_kernels_of_half_types_are_float32():
    arguments = make_arguments(dtype=torch.bfloat16)
    kernels = kernels_of(arguments)
    assert [each.dtype for each in kernels] == [torch.float32, torch.float32]
    assert relative_error(mixed_by(kernels, arguments['value'].float()), contmix(**arguments).float()) < 5e-3


def test_kernels_under_autocast():
    arguments = make_arguments(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        kernels = kernels_of(arguments)
    rounded = {name: arguments[name].to(torch.bfloat16) for name in ('query', 'key')}
    for got, expected in zip(kernels, kernels_of({**arguments, **rounded})):
        assert torch.equal(got, expected)


def test_kernels_have_gradients():
    arguments = make_arguments(batch=1, height=5, width=5, per_group=1, query_per_group=2, tokens=2)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != 'value']

    def run(*inputs):
        return kernels_of({**arguments, **dict(zip(names, inputs))})

    assert torch.autograd.gradcheck(run, [arguments[name].requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (replaced('query', lambda x: x.tolist()), TypeError, 'query must be a Tensor, got list'),
        (replaced('proj_bias', lambda x: 1.0), TypeError, 'proj_bias must be a Tensor or None, got float'),
        (replaced('num_groups', lambda x: 0), ValueError, 'num_groups must be at least 1, got 0'),
        (replaced('query', lambda x: x.int()), TypeError, 'query must be float16, .* got torch.int32'),
        (replaced('query', lambda x: x[0]), ValueError, r'query must have 4 dimensions, got shape \(4, 6, 9\)'),
        (replaced('query', lambda x: x[:, :3]), ValueError, 'query must have channels divisible by num_groups = 2, got 3'),
        (replaced('key', lambda x: x.to('meta')), ValueError, 'key must be on the device of query, cpu, got meta'),
        (replaced('key', lambda x: x.float()), TypeError, 'key must have dtype torch.float64 with query of torch.float64'),
        (replaced('key', lambda x: x[:1]), ValueError, r'key must have shape \(2, 4, S, S\), got \(1, 4, 3, 3\)'),
        (replaced('rpb_large', lambda x: x[0]), ValueError, r'rpb_large must have shape \(2, 9, 9\), got \(9, 9\)'),
        (replaced('large_kernel_size', lambda x: 7), ValueError, 'large_kernel_size must be at most .* 6, got 7'),
    ],
)
def test_bad_arguments_of_kernels(change, error, message):
    with pytest.raises(error, match=message):
        kernels_of(change(make_arguments()))
