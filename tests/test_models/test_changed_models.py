"""Models that users have changed: hooks, adapters, pruning, replaced and fused layers, other norms. All of it counts."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn as nn
from conftest import KeptBytes, relative_error
from test_reparam import randomise_statistics
from torch import Tensor
from torch.nn.utils import parametrizations, prune

from overlock_mm.models import ContMixBlock, OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.economy import run_block
from overlock_mm.models.layers import as_matrix
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops import use_references

conv2d_module = importlib.import_module('overlock_mm.ops.conv2d')
needs_products = pytest.mark.skipif(not conv2d_module.has_products(), reason='this PyTorch has no products of oneDNN')


def make(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block in training mode, every weight of which counts, and its inputs."""
    torch.manual_seed(0)
    x, h, prior = (torch.randn(2, channels, 9, 10, dtype=dtype) for channels in (16, 8, 8))
    if kind == 'basic':
        block, inputs = BasicBlock(16, 7, 4, 0.0, True), (x,)
    elif kind == 'dynamic':
        block, inputs = DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True, last=True), (x, h, prior)
    else:
        block, inputs = ContMixBlock(16, num_groups=2), (x,)
    randomise_statistics(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block.to(dtype), inputs


KINDS = ('basic', 'dynamic', 'contmix')
kinds = pytest.mark.parametrize('kind', KINDS)
#: All layers and all containers of layers in every kind of block.
LAYERS = [(kind, name) for kind in KINDS for name, _ in make(kind)[0].named_modules() if name]
layers = pytest.mark.parametrize('kind, name', LAYERS)


def gradients(block: nn.Module, inputs: tuple[Tensor, ...], policy: str = 'lean') -> list[Tensor]:
    """The output, and gradients of the inputs and of the parameters."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    leaves = [*inputs, *block.parameters()]
    out = run_block(policy, block, *inputs)
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found))]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(each.abs().max() for each in expected[1:])
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12 * largest)


def bend(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return torch.sin(2 * out)


class Bent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.sin(2 * self.layer(*inputs))


def replace(block: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition('.')
    block.get_submodule(parent).add_module(key, layer)


@layers
def test_hooks_count(kind, name):
    """What a hook makes of an output goes on, in the forward and into the gradients."""
    (hooked, inputs), (wrapped, _), (plain, _) = make(kind), make(kind), make(kind)
    hooked.get_submodule(name).register_forward_hook(bend)
    replace(wrapped, name, Bent(wrapped.get_submodule(name)))
    got = gradients(hooked, inputs)
    assert_close(got, gradients(wrapped, inputs))
    assert relative_error(got[0], plain(*inputs)) > 1e-6
    hooked.eval(), wrapped.eval()
    with torch.no_grad():
        assert relative_error(hooked(*inputs), wrapped(*inputs)) < 1e-12


@layers
def test_hooks_run_once_and_backward_hooks_too(kind, name):
    block, inputs = make(kind)
    layer, seen = block.get_submodule(name), []
    layer.register_forward_hook(lambda *_: seen.append('forward'))
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append('backward'))
    gradients(block, inputs)
    runs = 2 if name == 'drop_path' and kind == 'dynamic' else 1  # one layer for both branches
    assert seen == ['forward'] * runs + ['backward'] * runs


def weights_of(kind: str) -> list[str]:
    return [name for name, layer in make(kind)[0].named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


WEIGHTS = [(kind, name) for kind in KINDS for name in weights_of(kind)]
weighted_layers = pytest.mark.parametrize('kind, name', WEIGHTS)


@weighted_layers
def test_pruning(kind, name):
    """In one layer, over two steps: its weight is made in a hook before each forward."""
    (pruned, inputs), (zeroed, _) = make(kind), make(kind)
    prune.l1_unstructured(pruned.get_submodule(name), 'weight', amount=0.5)
    layer = pruned.get_submodule(name)
    with torch.no_grad():
        zeroed.get_submodule(name).weight *= layer.weight_mask
    for _ in range(2):
        assert relative_error(gradients(pruned, inputs)[0], gradients(zeroed, inputs)[0]) < 1e-12
        with torch.no_grad():
            layer.weight_orig *= 1.5
            zeroed.get_submodule(name).weight *= 1.5


@kinds
def test_pruning_every_convolution_over_two_steps(kind):
    block, inputs = make(kind)
    for name in weights_of(kind):
        prune.random_unstructured(block.get_submodule(name), 'weight', amount=0.3)
    for _ in range(2):
        block.zero_grad()
        block(*inputs).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters() if p.grad is not None)


@weighted_layers
@pytest.mark.parametrize('how', ['spectral_norm', 'weight_norm', 'old weight_norm'])
def test_normalised_weights(kind, name, how):
    (changed, inputs), (plain, _) = make(kind), make(kind)
    layer = changed.get_submodule(name)
    {
        'spectral_norm': parametrizations.spectral_norm,
        'weight_norm': parametrizations.weight_norm,
        'old weight_norm': torch.nn.utils.weight_norm,
    }[how](layer)
    changed.eval(), plain.eval()
    with torch.no_grad():
        if how == 'spectral_norm':
            plain.get_submodule(name).weight.copy_(layer.weight)
        else:  # twice the length
            length = layer.weight_g if how.startswith('old') else layer.parametrizations.weight.original0
            length *= 2
            plain.get_submodule(name).weight.mul_(2)
    out = changed(*inputs)
    assert relative_error(out, plain(*inputs)) < 1e-12
    out.square().sum().backward()
    names = [n for n, _ in changed.named_parameters() if n.startswith(name) and ('weight_' in n or 'original' in n)]
    assert names
    assert all(changed.get_parameter(n).grad.any() for n in names)


class Adapter(nn.Module):
    """A layer with a low-rank update beside it, as LoRA has it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(layer.in_features, 2, False), nn.Linear(2, layer.out_features, False)
        else:
            self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    'kind, name',
    [(kind, name) for kind, name in WEIGHTS if getattr(make(kind)[0].get_submodule(name), 'groups', 1) == 1],
)
def test_adapters(kind, name):
    """The same as the layer with the update in its weight."""
    (adapted, inputs), (merged, _) = make(kind), make(kind)
    adapter = Adapter(adapted.get_submodule(name))
    replace(adapted, name, adapter)
    with torch.no_grad():
        update = adapter.up.weight.flatten(1) @ adapter.down.weight.flatten(1)
        weight = merged.get_submodule(name).weight
        weight += update.view_as(weight)
    adapted.eval(), merged.eval()
    out = adapted(*inputs)
    assert relative_error(out, merged(*inputs)) < 1e-12
    assert relative_error(out, make(kind)[0].eval()(*inputs)) > 1e-6
    out.square().sum().backward()
    assert adapter.up.weight.grad.any()


@pytest.mark.parametrize('name', ['sub_blocks4.1.mlp', 'sub_blocks4.1.weight_proj', 'blocks1.0.proj', 'sub_blocks3.0.gate'])
def test_maps_and_gradients_of_a_container(small_arch, name):
    """As Grad-CAM takes them from the layer that it is asked for."""
    backbone, seen = OverLoCK(small_arch).eval(), {}
    randomise_statistics(backbone)

    def look(module, inputs, out):
        seen['map'] = out
        out.register_hook(lambda gradient: seen.update(gradient=gradient))

    backbone.get_submodule(name).register_forward_hook(look)
    backbone(torch.randn(1, 3, 64, 64))[0].square().sum().backward()
    assert seen['map'].shape == seen['gradient'].shape
    assert seen['gradient'].isfinite().all()


@pytest.mark.parametrize(
    'change',
    [
        lambda tensor: tensor.data.mul_(2),
        lambda tensor: tensor.detach().mul_(2),
        lambda tensor: torch.from_dlpack(tensor.detach()).mul_(2),
        lambda tensor: torch.from_numpy(tensor.detach().numpy()).mul_(2),
    ],
    ids=['data', 'detach', 'dlpack', 'numpy'],
)
@kinds
def test_the_current_weights_count(kind, change):
    """However they were changed, in every mode: nothing is kept that was made of them."""
    block, inputs = make(kind)
    block.eval()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for name, tensor in block.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                before = block(*inputs)
                change(tensor)
                after = block(*inputs)
                assert torch.equal(after, copy.deepcopy(block)(*inputs)), name
                assert not torch.equal(after, before), name
                tensor /= 2
                block.eval()


def test_the_current_weights_of_a_large_convolution_count():
    conv = DilatedReparamConv(4, 7).eval()
    x = torch.randn(1, 4, 12, 12)
    with torch.no_grad():
        conv(x)
        for parameter in conv.parameters():
            parameter.data.mul_(2)
        expected = sum(norm(branch(x)) for branch, norm in conv.branches())
        assert relative_error(conv(x), expected) < 1e-6


@pytest.mark.parametrize('with_gradients', [True, False])
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
def test_another_convolution(index, channels, settings, with_gradients):
    """In the place of one of ours, it runs as it is."""
    block, inputs = make('basic', torch.float32)
    block.proj[index] = nn.Conv2d(*channels, **settings)
    wrapped = copy.deepcopy(block)
    wrapped.proj[index] = nn.Sequential(wrapped.proj[index])
    with torch.set_grad_enabled(with_gradients):
        assert relative_error(block(*inputs), wrapped(*inputs)) < 1e-6


@pytest.mark.parametrize('setting, value', [('stride', (2, 2)), ('dilation', (2, 2)), ('padding', (0, 0))])
def test_changed_settings_of_a_convolution_count(small_arch, setting, value):
    backbone = OverLoCK(small_arch)
    conv, x = backbone.patch_embed1[3], torch.randn(1, 4, 16, 16)
    setattr(conv, setting, value)
    assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))


def test_another_activation():
    block, inputs = make('basic')
    block.eval()
    expected = block(*inputs)
    block.proj[5] = nn.ReLU()
    with torch.no_grad():
        assert relative_error(block(*inputs), expected) > 1e-3


@kinds
def test_inputs_stay_as_they_were(kind):
    block, inputs = make(kind)
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        block(*inputs)
    assert all(torch.equal(x, copied) for x, copied in zip(inputs, copies))


@pytest.mark.skipif(
    tuple(int(number) for number in torch.__version__.split('.')[:2]) < (2, 7),
    reason='torch < 2.7 does not say that it exports',
)
def test_the_batch_is_free_in_an_export():
    """Also where its size would decide how a 1x1 convolution runs."""
    block = BasicBlock(256, 7, 4, 0.0, False).eval()
    x = torch.randn(2, 256, 7, 7)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},))
    for batch in (2, 16):
        x = torch.randn(batch, 256, 7, 7)
        with torch.no_grad():
            assert relative_error(exported.module()(x), block(x)) < 1e-5


@needs_products
@pytest.mark.parametrize('kind', ['basic', 'dynamic'])
def test_products_of_matrices(kind, monkeypatch):
    """A 1x1 convolution of few positions: the same results, gradients and memory, whichever way it goes."""
    block = BasicBlock(16, 7, 4, 0.0, True) if kind == 'basic' else DynamicBlock(16, 8, 2, 7, 3, 0.0, mix_context=True)
    x = torch.randn(2, 24, 8, 9).contiguous(memory_format=torch.channels_last)
    inputs = (x[:, :16],) if kind == 'basic' else (x[:, :16], x[:, 16:], x[:, 16:])
    products = []
    monkeypatch.setattr(conv2d_module, '_number_of_modes', lambda: 0)  # what counts bytes here is one
    product = conv2d_module._product
    monkeypatch.setattr(conv2d_module, '_product', lambda *args: products.append(1) or product(*args))

    def run(dtype, weights_per_position):
        monkeypatch.setattr(conv2d_module, 'WEIGHTS_PER_POSITION', weights_per_position)
        copied = copy.deepcopy(block).to(dtype)
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
        with KeptBytes() as kept:
            out = run_block('lean', copied, *leaves)
            kept_bytes = kept.count(*leaves, *copied.state_dict().values())
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

    def bybranches() -> Tensor:
        return sum(norm(branch(x)) for branch, norm in conv.branches())

    for training in (True, False):
        conv.train(training)
        assert relative_error(conv(x), bybranches()) < 1e-12
        with torch.no_grad():
            assert relative_error(conv(x), bybranches()) < 1e-12
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
    expected = sum(norm(branch(x)) for branch, norm in conv.branches())
    assert relative_error(conv(x), expected) < 1e-12


@pytest.mark.parametrize('function', ['eval', 'train'])
def test_half_weights_under_autocast(small_arch, function):
    backbone = getattr(OverLoCK(small_arch).bfloat16(), function)()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = backbone(torch.randn(2, 3, 64, 64))[0]
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@kinds
def test_replicas_of_data_parallel(kind):
    """Their weights are attributes, and no parameters."""
    block, inputs = make(kind)
    replica = copy.deepcopy(block)
    for module in replica.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach())
    block.eval(), replica.eval()
    assert relative_error(replica(*inputs), block(*inputs)) < 1e-12


def test_quantized_linear_layers():
    block = ContMixBlock(32, num_groups=1, layer_scale_init_value=1.0).eval()
    x = torch.randn(1, 32, 9, 9)
    quantized = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    assert 0 < relative_error(quantized(x), block(x)) < 1e-2


@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.bfloat16, 1e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)], ids=str
)
@torch.no_grad()
def test_the_matrix_of_a_layer_beside_a_large_bias(dtype, tolerance):
    layer = nn.Conv2d(49, 194, 1)
    layer.weight.normal_(std=0.02)
    layer.bias.normal_(std=3)
    layer.to(dtype)
    for autocast in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            weight, bias = as_matrix(layer, 49, like=layer.weight)
        assert relative_error(weight, layer.weight.flatten(1)) < tolerance
        assert torch.equal(bias, layer.bias)


def test_second_derivatives(small_arch):
    """A gradient penalty: refused with the way out, which is right."""
    model = OverLoCK(small_arch).double().eval()
    x, direction = torch.randn(1, 3, 64, 64).double().requires_grad_(), torch.randn(1, 3, 64, 64).double()

    def slope(at):
        """d/dt of the network's sum at ``at + t * direction``, by the first derivative."""
        (grad,) = torch.autograd.grad(model(at)[-1].square().sum(), at, create_graph=True)
        return (grad * direction).sum()

    with pytest.raises(RuntimeError, match=r'no second derivative.*with overlock_mm\.ops\.use_references\(\)'):
        torch.autograd.grad(slope(x), x)
    with use_references():
        (second,) = torch.autograd.grad(slope(x), x)
        step = 1e-4
        ahead, behind = (slope((x + t * direction).detach().requires_grad_()).item() for t in (step, -step))
    expected = (ahead - behind) / (2 * step)
    assert abs((second * direction).sum().item() - expected) < 1e-5 * abs(expected)
