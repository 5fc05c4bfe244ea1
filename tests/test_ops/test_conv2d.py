"""Dense convolutions, as oneDNN's products of matrices too, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch.overrides import TorchFunctionMode

from overlock_mm.ops import conv2d, use_references
from overlock_mm.ops.conv2d import WEIGHTS_PER_POSITION, _Convolution, _fits, has_products, is_faster_as_product

pytestmark = pytest.mark.skipif(not has_products(), reason='this PyTorch has no oneDNN, or not its products')

SETTINGS = pytest.mark.parametrize(
    'kernel_size, stride, size',
    [(1, 1, (3, 5)), (1, 2, (5, 4)), (3, 1, (4, 6)), (3, 2, (7, 10)), (3, 2, (1, 1)), (5, 3, (9, 6))],
)


def make(kernel_size=3, size=(7, 10), batch=2, channels=6, outputs=10, bias=True):
    return dict(
        x=torch.randn(batch, channels, *size).contiguous(memory_format=torch.channels_last),
        weight=torch.randn(outputs, channels, kernel_size, kernel_size) / kernel_size,
        bias=torch.randn(outputs) if bias else None,
    )


def conv2d_as_product(x, weight, bias, stride=(1, 1)):
    return _Convolution.apply(x, weight, bias, stride)


def plain(x, weight, bias, stride=(1, 1)):
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def gradients_of(function, tensors, stride, dtype=torch.float32):
    leaves = {name: each.detach().to(dtype).requires_grad_() for name, each in tensors.items() if each is not None}
    out = function(**{**tensors, **leaves}, stride=(stride, stride))
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(out.shape, generator=generator).to(dtype)
    return dict(out=out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_output))))


@SETTINGS
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous', 'slice', 'weight in channels_last'])
def test_results_and_gradients(kernel_size, stride, size, bias, layout):
    tensors = make(kernel_size, size, bias=bias)
    if layout == 'contiguous':
        tensors['x'] = tensors['x'].contiguous()
    elif layout == 'slice':
        tensors['x'] = torch.cat([tensors['x'], tensors['x']], dim=1)[:, 3:9]
    elif layout == 'weight in channels_last':
        tensors['weight'] = tensors['weight'].contiguous(memory_format=torch.channels_last)
    expected = gradients_of(plain, tensors, stride, torch.float64)
    got = gradients_of(conv2d_as_product, tensors, stride)
    assert got.keys() == expected.keys()
    for name, each in expected.items():
        assert got[name].shape == each.shape
        assert relative_error(got[name], each) < 1e-6, name
    assert got['out'].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('outputs', [10, 32])
@pytest.mark.parametrize('layout', ['expanded', 'strided'])
def test_layouts_of_the_bias(layout, outputs):
    tensors = make(outputs=outputs)
    bias = torch.randn(2 * outputs)
    tensors['bias'] = bias[:1].expand(outputs) if layout == 'expanded' else bias[::2]
    assert relative_error(conv2d_as_product(**tensors), plain(**tensors)) < 1e-6


def test_without_the_compiled_operator():
    """PyTorch's own copies do, and give the same bits."""
    tensors = make()
    expected = gradients_of(conv2d_as_product, tensors, stride=2)
    with use_references():
        got = gradients_of(conv2d_as_product, tensors, stride=2)
    for name, each in expected.items():
        assert torch.equal(got[name], each), name


@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias'])
def test_only_the_gradients_asked_for(wanted):
    tensors = make()
    tensors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(conv2d_as_product(**tensors).square().sum(), tensors[wanted])
    (expected,) = torch.autograd.grad(plain(**tensors).square().sum(), tensors[wanted])
    assert relative_error(got, expected) < 1e-6


@SETTINGS
@pytest.mark.parametrize('frozen', [(), ('x',), ('weight',)])
def test_it_keeps_what_a_convolution_keeps(kernel_size, stride, size, frozen):
    """Not the rows, which are up to nine times the map."""
    kept_bytes = []
    for function in (plain, conv2d_as_product):
        tensors = {name: each.requires_grad_(name not in frozen) for name, each in make(kernel_size, size).items()}
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(**tensors, stride=(stride, stride))
        kept_bytes.append(sum(storages.values()))
        assert out.requires_grad
    assert 0 < kept_bytes[1] <= kept_bytes[0]


def test_second_derivatives():
    results = []
    for function in (plain, conv2d_as_product):
        torch.manual_seed(0)
        tensors = {name: each.requires_grad_() for name, each in make().items()}
        out = function(**tensors, stride=(2, 2))
        first = torch.autograd.grad(out.square().sum(), list(tensors.values()), create_graph=True)
        results.append(torch.autograd.grad(sum(each.square().sum() for each in first), list(tensors.values())))
    for got, expected in zip(*reversed(results)):
        assert relative_error(got, expected) < 1e-5


def takes(x, weight, bias=None):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return _fits(x, weight, bias, (1, 1), padding, (1, 1), 1) and is_faster_as_product(x, weight, bias, (1, 1))


def test_which_it_takes():
    x, weight, bias = torch.randn(1, 64, 2, 2), torch.randn(64, 64, 1, 1), torch.randn(64)
    assert takes(x, weight, bias)
    assert takes(x, torch.nn.Parameter(weight))
    positions = weight.numel() // WEIGHTS_PER_POSITION
    assert takes(torch.randn(1, 64, 1, positions), weight)
    assert not takes(torch.randn(1, 64, 1, positions + 1), weight)
    # A kernel in channels_last would have to be laid out anew, and so would its gradient.
    kernel = torch.randn(64, 64, 3, 3)
    assert takes(x, kernel)
    assert not takes(x, kernel.contiguous(memory_format=torch.channels_last))
    assert takes(x, weight.contiguous(memory_format=torch.channels_last))
    # What does not go together is for the convolution to refuse.
    assert not takes(x[:, :5], weight)
    assert not takes(x[0], weight)
    assert not takes(x, weight.bfloat16())
    assert not takes(x, weight, bias.half())
    assert not takes(x.double(), weight.double())
    assert not takes(x.to('meta'), weight.to('meta'))
    assert not takes(x[:0], weight)
    with torch.autocast('cpu', torch.bfloat16):
        assert not takes(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes(x, weight)
    with torch.autograd.forward_ad.dual_level():
        assert not takes(x, weight)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        assert not takes(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert takes(x, weight)


@pytest.mark.parametrize(
    'settings', [{}, dict(stride=(2, 2)), dict(groups=2), dict(dilation=(2, 2)), dict(padding=(0, 0))], ids=str
)
@pytest.mark.parametrize('kernel_size, size', [(1, (1, 1)), (1, (5, 4)), (3, (1, 1)), (3, (6, 5)), (3, (40, 40))])
def test_every_setting_is_that_of_a_convolution(kernel_size, size, settings):
    """Whichever way is chosen, in results and gradients."""
    settings = dict(padding=(kernel_size // 2, kernel_size // 2), **settings) if 'padding' not in settings else settings
    x = torch.randn(2, 16, *size, requires_grad=True)
    weight = torch.randn(32, 16 // settings.get('groups', 1), kernel_size, kernel_size, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    try:
        expected = F.conv2d(x, weight, bias, **settings)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as raised:
            conv2d(x, weight, bias, **settings)
        assert str(raised.value) == str(error)
        return
    got = conv2d(x, weight, bias, **settings)
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-6
    grad = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, weight, bias), grad) for out in (got, expected))):
        assert relative_error(mine, theirs) < 1e-6


def is_product(out: torch.Tensor) -> bool:
    return '_Convolution' in type(out.grad_fn).__name__


def test_the_choice():
    x, weight = torch.randn(1, 64, 2, 2), torch.randn(64, 64, 1, 1, requires_grad=True)
    assert is_product(conv2d(x, weight))
    assert not is_product(conv2d(torch.randn(1, 64, 30, 30), weight))
    with use_references():
        assert not is_product(conv2d(x, weight))
    assert not is_product(conv2d(torch.randn(1, 64, 1, 1), weight))  # a linear layer


def test_one_position_is_a_linear_layer_in_every_dtype():
    for dtype in (torch.float64, torch.bfloat16):
        x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((3, 16, 1, 1), (8, 16, 1, 1), (8,)))
        out = conv2d(x, weight, bias)
        assert out.shape == (3, 8, 1, 1)
        assert relative_error(out, F.conv2d(x.double(), weight.double(), bias.double())) < 1e-2


@pytest.mark.parametrize('size', [1, 2])
@pytest.mark.parametrize(
    'wrong',
    [*(dict(bias=torch.ones(shape)) for shape in ((), (1,), (3,), (1, 64))), dict(stride=(0, 1)), dict(stride=(1, 1, 1))],
    ids=lambda wrong: str({name: getattr(value, 'shape', value) for name, value in wrong.items()}),
)
def test_what_a_convolution_refuses(wrong, size):
    """With the same error, and where a product or a linear layer would take it."""
    x, weight = torch.randn(1, 64, size, size), torch.randn(64, 64, 1, 1)
    with pytest.raises(RuntimeError) as expected:
        F.conv2d(x, weight, **wrong)
    with pytest.raises(RuntimeError) as raised:
        conv2d(x, weight, **wrong)
    assert str(raised.value) == str(expected.value)


def test_a_bias_that_is_no_tensor():
    with pytest.raises(TypeError, match='bias'):
        conv2d(torch.randn(1, 64, 2, 2), torch.randn(64, 64, 1, 1), 1.0)


@pytest.mark.parametrize('stride', [1, 2, (2,), [2, 1]], ids=str)
def test_strides_in_other_forms(stride):
    x, weight = torch.randn(1, 64, 3, 2), torch.randn(64, 64, 1, 1)
    assert torch.equal(conv2d(x, weight, stride=stride), F.conv2d(x, weight, stride=stride))


@pytest.mark.parametrize('bad', ['channels', 'dtype'])
def test_bad_arguments_are_refused_by_the_convolution(bad):
    x, weight = torch.randn(1, 64, 2, 2), torch.randn(64, 64, 3, 3)
    with pytest.raises(RuntimeError, match='channels' if bad == 'channels' else 'type'):
        conv2d(x[:, :2] if bad == 'channels' else x, weight if bad == 'channels' else weight.bfloat16(), padding=(1, 1))


def test_operations_are_counted():
    """PyTorch's counter does not know the products."""
    counters = pytest.importorskip('torch.utils.flop_counter')
    x, weight = torch.randn(1, 64, 2, 2), torch.randn(64, 64, 1, 1)
    with counters.FlopCounterMode(display=False) as counter:
        conv2d(x, weight)
    assert counter.get_total_flops() == 2 * 64 * 64 * 4


def test_modes_see_what_is_not_a_product():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        conv2d(torch.randn(1, 8, 30, 30), torch.randn(8, 8, 1, 1))
        conv2d(torch.randn(1, 8, 1, 1), torch.randn(8, 8, 1, 1))
    assert F.conv2d in seen
    assert F.linear in seen
    assert not any('__get__' in str(function) for function in seen)
