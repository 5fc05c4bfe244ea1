"""Models that users have changed: hooks, replaced and fused layers, other norms. What is fast must not pass them over."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn as nn
from conftest import KeptBytes, relative_error
from test_reparam import randomise_statistics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from overlock_mm.models import OverLoCK, convolutions
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops import _maps, _packed, _products

needs_products = pytest.mark.skipif(not _products.has_products(), reason='this PyTorch has no products of oneDNN')


def bend(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return torch.sin(2 * out)


def make_basic() -> BasicBlock:
    torch.manual_seed(0)
    return BasicBlock(16, 7, 4, 0.0, True).double()


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])


@pytest.mark.parametrize('index', range(9), ids=lambda i: f'proj.{i}')
def test_hooks_count(index):
    """On any layer of a block: what the hook makes goes on, in the forward and into the gradients."""
    x = torch.randn(2, 16, 9, 10, dtype=torch.float64)
    hooked, wrapped = make_basic(), make_basic()
    hooked.proj[index].register_forward_hook(bend)
    wrapped.proj[index] = Bent(wrapped.proj[index])
    assert relative_error(hooked(x), wrapped(x)) < 1e-12
    assert relative_error(hooked(x), make_basic()(x)) > 1e-6
    for got, expected in zip(gradients(hooked, x), gradients(wrapped, x)):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


class Bent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.sin(2 * self.layer(*inputs))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize('deploy', [False, True])
def test_hooks_count_at_inference(deploy, dtype, tolerance):
    x = torch.randn(2, 16, 9, 10, dtype=dtype)
    for index in range(9):
        hooked = make_basic().eval().to(dtype)
        randomise_statistics(hooked)
        if deploy:
            hooked.proj[1].switch_to_deploy()
            hooked.switch_to_deploy()
        wrapped = copy.deepcopy(hooked)
        hooked.proj[index].register_forward_hook(bend)
        wrapped.proj[index] = Bent(wrapped.proj[index])
        with torch.no_grad():
            assert relative_error(hooked(x), wrapped(x)) < tolerance, index


def make_deployed(kind: str, size: int = 24) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block and its inputs. From 65 x 65 positions on, 3x3 depth-wise convolutions in bfloat16 are oneDNN's."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, size, size)
    if kind == 'basic':
        block, inputs = BasicBlock(16, 7, 4, 0.0, False), (x,)
    elif kind == 'basic with LayerScale':
        block, inputs = BasicBlock(16, 7, 4, 0.0, True), (x,)
    else:
        block, inputs = DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True, last=True), (x, x[:, :8], x[:, 8:])
    block.eval()
    randomise_statistics(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    block.switch_to_deploy()
    for conv in [module for module in block.modules() if isinstance(module, DilatedReparamConv)]:
        conv.switch_to_deploy()
    return block, inputs


TORCH = tuple(int(number) for number in torch.__version__.split('.')[:2])
kinds = pytest.mark.parametrize('kind', ['basic', 'basic with LayerScale', 'dynamic'])


@kinds
@pytest.mark.parametrize('size', [9, 24])
def test_what_a_hook_holds_stays_as_it_was(kind, size):
    """Maps are overwritten at inference, but not those that somebody has seen. Each layer in turn, and all."""
    block, inputs = make_deployed(kind, size)
    with torch.no_grad():
        expected = block(*inputs)
    names = [name for name, module in block.named_modules() if name]
    for hooked in [*([name] for name in names), names, ['every module there is']]:
        seen = []

        def look(module, given, out, seen=seen):
            if module is not block:
                seen.extend((each, each.clone()) for each in (*given, out))

        if hooked == ['every module there is']:
            handles = [nn.modules.module.register_module_forward_hook(look)]
        else:
            handles = [block.get_submodule(name).register_forward_hook(look) for name in hooked]
        with torch.no_grad():
            assert relative_error(block(*inputs), expected) < 1e-5, hooked
        for handle in handles:
            handle.remove()
        for held, copied in seen:
            assert torch.equal(held, copied), hooked


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('gradients', [True, False])
@pytest.mark.parametrize(
    'settings',
    [
        dict(kernel_size=3, padding='same', dilation=2),
        dict(kernel_size=3, padding=1, padding_mode='reflect'),
        dict(kernel_size=1, groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize('index, channels', [(4, (16, 64)), (8, (64, 16))])
def test_another_convolution(index, channels, settings, gradients, deploy):
    """In the place of one of ours, it runs as it is."""
    block, (x,) = make_deployed('basic')
    block.deploy = deploy
    other = nn.Conv2d(*channels, **settings)
    block.proj[index] = other
    wrapped = copy.deepcopy(block)
    wrapped.proj[index] = nn.Sequential(other)  # which nobody looks into
    with torch.set_grad_enabled(gradients):
        assert relative_error(block(x), wrapped(x)) < 1e-6


@kinds
def test_inputs_stay_as_they_were(kind):
    block, inputs = make_deployed(kind)
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        block(*inputs)
    assert all(torch.equal(x, copied) for x, copied in zip(inputs, copies))


@kinds
@pytest.mark.parametrize('size', [9, 24])
def test_every_change_of_a_tensor_is_seen(kind, size):
    """Of each parameter and statistic, by what is packed and folded."""
    block, inputs = make_deployed(kind, size)
    with torch.no_grad():
        before = block(*inputs)
        for name, tensor in block.state_dict().items():
            if not tensor.is_floating_point():
                continue
            tensor *= 1.5
            tensor += 0.1
            out = block(*inputs)
            assert not torch.equal(out, before), name
            assert relative_error(out, copy.deepcopy(block)(*inputs)) < 1e-6, name
            before = out


@kinds
def test_statistics_that_training_changes_are_seen(kind):
    """PyTorch counts no version of them, only the batches."""
    block, inputs = make_deployed(kind)
    with torch.no_grad():
        before = block(*inputs)
        for name, norm in block.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train()(torch.randn(3, norm.num_features, 5, 5))
                norm.train(False)
                out = block(*inputs)
                assert not torch.equal(out, before), name
                assert relative_error(out, copy.deepcopy(block)(*inputs)) < 1e-6, name
                before = out


def test_a_changed_stride_is_seen():
    layers = convolutions.ConvSequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), deploy=True).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert layers(x).shape == (1, 8, 8, 8)
        layers[0].stride = (1, 1)
        assert relative_error(layers(x), layers[1](layers[0](x))) < 1e-5


@pytest.mark.parametrize('index', range(9), ids=lambda i: f'proj.{i}')
def test_backward_hooks_run(index):
    block = make_basic()
    seen = []
    block.proj[index].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    block(torch.randn(2, 16, 9, 10, dtype=torch.float64)).sum().backward()
    assert len(seen) == 1
    assert seen[0].any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_inputs_of_another_dtype_are_refused(dtype):
    block, (x,) = make_deployed('basic')
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match='type'):
        block.bfloat16()(x) if dtype == torch.float32 else block(x.double())


@pytest.mark.skipif(TORCH < (2, 7), reason='torch < 2.7 does not say that it exports')
def test_the_batch_is_free_in_an_export():
    """Also where its size would decide how a 1x1 convolution runs."""
    block = BasicBlock(256, 7, 4, 0.0, False).eval()
    x = torch.randn(2, 256, 7, 7)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},))
    for batch in (2, 16):
        x = torch.randn(batch, 256, 7, 7)
        with torch.no_grad():
            assert relative_error(exported.module()(x), block(x)) < 1e-5


class Counter(TorchDispatchMode):
    """Counts operators by their namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.namespace] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN, and nothing is packed')
@kinds
def test_convolutions_are_packed(kind):
    """In a deployed model at inference, and nowhere else; depth-wise 3x3 ones only in bfloat16."""
    block, inputs = make_deployed(kind, size=65)
    with torch.no_grad():
        block(*inputs)
        with Counter() as packed:
            block(*inputs)
        with torch.autocast('cpu', torch.bfloat16):
            block(*inputs)
            with Counter() as packed_bfloat16:
                block(*inputs)
        with Counter() as not_deployed:
            BasicBlock(16, 7, 4, 0.0, False).eval()(inputs[0])
    with Counter() as with_gradients:
        block(*inputs)
    number, depthwise = (9, 2) if kind == 'dynamic' else (2, 1)
    assert packed.counts['mkldnn'] == number
    in_bfloat16 = number + depthwise * _maps.HAS_FAST_BFLOAT16 if _packed._has_bfloat16() else 0
    assert packed_bfloat16.counts['mkldnn'] == in_bfloat16
    assert not_deployed.counts['mkldnn'] == with_gradients.counts['mkldnn'] == 0


@kinds
def test_bfloat16_under_autocast(kind):
    """The same precision as of convolutions that are not packed."""
    block, inputs = make_deployed(kind)
    with torch.no_grad():
        expected = block(*inputs)
        with torch.autocast('cpu', torch.bfloat16):
            packed = block(*inputs)
    with torch.autocast('cpu', torch.bfloat16):
        plain = block(*inputs)
    assert relative_error(packed, expected) < max(1.2 * relative_error(plain, expected), 1e-2)


@needs_products
@pytest.mark.parametrize('kind', ['basic', 'dynamic'])
def test_products_of_matrices(kind, monkeypatch):
    """A 1x1 convolution of few positions: the same results, gradients and memory, whichever way it goes."""
    block = BasicBlock(16, 7, 4, 0.0, True) if kind == 'basic' else DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True)
    x = torch.randn(2, 24, 8, 9).contiguous(memory_format=torch.channels_last)
    inputs = (x[:, :16],) if kind == 'basic' else (x[:, :16], x[:, 16:], x[:, 16:])
    products = []
    monkeypatch.setattr(_products, '_number_of_modes', lambda: 0)  # what counts bytes here is one
    product = convolutions.conv2d_as_product
    monkeypatch.setattr(convolutions, 'conv2d_as_product', lambda *args: products.append(1) or product(*args))

    def run(dtype, weights_per_position):
        monkeypatch.setattr(_products, 'WEIGHTS_PER_POSITION', weights_per_position)
        copied = copy.deepcopy(block).to(dtype)
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        with KeptBytes() as kept:
            out = copied(*leaves)
            kept_bytes = kept.count()
        out = out if isinstance(out, Tensor) else torch.cat(out, dim=1)
        gradients = torch.autograd.grad(out.square().sum(), [*leaves, *copied.parameters()], allow_unused=True)
        return out, gradients, kept_bytes

    exact, exact_gradients, _ = run(torch.float64, float('inf'))
    out, gradients, kept_bytes = run(torch.float32, float('inf'))
    assert not products
    other, other_gradients, other_bytes = run(torch.float32, 0)
    assert products
    assert relative_error(other, exact) < max(1e-6, 2 * relative_error(out, exact))
    for got, plain, expected in zip(other_gradients, gradients, exact_gradients):
        assert (got is None) == (plain is None) == (expected is None)
        if got is not None:
            # The gradient of a bias in front of a batch norm is 0, but for rounding.
            assert (got - expected).norm() < max(1e-5 * expected.norm(), 4 * (plain - expected).norm())
    assert other_bytes <= 1.02 * kept_bytes


def deep_stem(monkeypatch):
    """Two 3x3 convolutions with norms; on a small map they are products of matrices."""
    monkeypatch.setattr(_products, 'WEIGHTS_PER_POSITION', 0)
    stem = convolutions.ConvSequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
    )
    return stem, torch.randn(2, 3, 12, 12)


@needs_products
def test_hooks_for_all_modules_see_convolutions_that_would_be_products(monkeypatch):
    stem, x = deep_stem(monkeypatch)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        expected = stem(x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 2
    assert relative_error(stem(x), expected) < 1e-6


@needs_products
def test_operations_are_counted(monkeypatch):
    """PyTorch's counter does not know the products."""
    counters = pytest.importorskip('torch.utils.flop_counter')
    stem, x = deep_stem(monkeypatch)
    with counters.FlopCounterMode(display=False) as counter:
        stem(x)
    assert counter.get_total_flops() == 2 * 2 * (36 * 8 * 27 + 9 * 12 * 72)


@needs_products
def test_what_does_not_fit_is_refused_by_the_convolution(monkeypatch):
    stem, x = deep_stem(monkeypatch)
    with pytest.raises(RuntimeError, match='channels'):
        stem(x[:, :2])
    stem[0].to(torch.bfloat16)
    with pytest.raises(RuntimeError, match='type'):
        stem(x)


def test_a_hook_runs_once(small_arch):
    backbone = OverLoCK(small_arch)
    seen = []
    for name in ('blocks1.0.dwconv', 'blocks1.0.proj.2', 'sub_blocks3.0.norm1', 'sub_blocks3.0.gate.1'):
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    backbone(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert len(seen) == len(set(seen)) == 4


def test_another_activation():
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    block = make_basic().eval()
    expected = block(x)
    block.proj[5] = nn.ReLU()
    with torch.no_grad():
        assert relative_error(block(x), expected) > 1e-3
        assert relative_error(block(x), block.train(False)(x)) < 1e-12


@pytest.mark.parametrize('order', ['eval first', 'fused first'])
def test_fuse_conv_bn(order):
    """mmcv's fusion of convolutions and batch norms, which leaves identities behind."""
    fuse_conv_bn = pytest.importorskip('mmcv.cnn.utils').fuse_conv_bn
    conv = DilatedReparamConv(8, 9).double()
    randomise_statistics(conv)
    x = torch.randn(2, 8, 15, 13, dtype=torch.float64)
    expected = conv.eval()(x)
    fused = fuse_conv_bn(conv if order == 'eval first' else conv.train().eval())
    with torch.no_grad():
        assert relative_error(fused.eval()(x), expected) < 1e-9


def test_every_norm_has_its_own_eps():
    conv = DilatedReparamConv(8, 9).double()
    randomise_statistics(conv)
    for i, norm in enumerate(module for module in conv.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 0.1 * (i + 1)
    x = torch.randn(2, 8, 15, 13, dtype=torch.float64)

    def by_branches() -> Tensor:
        return sum(norm(branch(x)) for branch, norm in conv._branches())

    for training in (True, False):
        conv.train(training)
        assert relative_error(conv(x), by_branches()) < 1e-12
        with torch.no_grad():
            assert relative_error(conv(x), by_branches()) < 1e-12
    expected = conv(x)
    conv.switch_to_deploy()
    assert relative_error(conv(x), expected) < 1e-12


def test_a_changed_eps_is_seen():
    conv = DilatedReparamConv(8, 9).double().eval()
    x = torch.randn(1, 8, 15, 13, dtype=torch.float64)
    with torch.no_grad():
        before = conv(x)
        for module in conv.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1.0
        assert relative_error(conv(x) * 2**0.5, before) < 1e-5


@pytest.mark.parametrize('training', [True, False])
def test_norms_without_parameters(training):
    conv = DilatedReparamConv(8, 9).double()
    for name, module in list(conv.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(conv, name, nn.BatchNorm2d(8, affine=False).double())
    conv.train(training)
    x = torch.randn(2, 8, 15, 13, dtype=torch.float64)
    expected = sum(norm(branch(x)) for branch, norm in conv._branches())
    assert relative_error(conv(x), expected) < 1e-12


def test_switching_a_block_alone():
    x = torch.randn(2, 16, 12, 12)
    for block, inputs in (
        (BasicBlock(16, 7, 4, 0.0, False), (x,)),
        (DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True, last=True), (x, x[:, :8], x[:, 8:])),
    ):
        block.eval()
        randomise_statistics(block)
        expected = block(*inputs)
        block.switch_to_deploy()
        with torch.no_grad():
            assert relative_error(block(*inputs), expected) < 1e-5


@pytest.mark.parametrize('function', ['eval', 'train'])
def test_half_weights_under_autocast(small_arch, function):
    backbone = getattr(OverLoCK(small_arch).bfloat16(), function)()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = backbone(torch.randn(2, 3, 64, 64))[0]
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_folded_weights_are_made_once(small_arch, monkeypatch):
    from overlock_mm.models import convolutions, reparam

    backbone = OverLoCK(small_arch).eval()
    folds = []
    monkeypatch.setattr(reparam, '_one_kernel', lambda *args, fold=reparam._one_kernel: folds.append(1) or fold(*args))
    monkeypatch.setattr(convolutions, '_fold', lambda *args, fold=convolutions._fold: folds.append(1) or fold(*args))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        backbone(x)
        first = len(folds)
        backbone(x)
        assert len(folds) == first > 0
        backbone.switch_to_deploy()
        backbone(x)
        second = len(folds)
        backbone(x)
        assert len(folds) == second > first
