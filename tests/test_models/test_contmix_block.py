"""ContMix as a module of its own, and as a plugin layer of mmcv."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import autocast_dtypes, devices, relative_error

from overlock_mm.models import ContMixBlock

TYPE = 'overlock_mm.ContMixBlock'
PLUGINS = [dict(cfg=dict(type=TYPE), stages=(False, True, True, True), position='after_conv2')]


def trained(*args, **settings) -> ContMixBlock:
    """A block that is no longer the identity, nor symmetric in anything."""
    block = ContMixBlock(*args, **settings)
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize('framework', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_from_every_registry_and_as_a_plugin_without_custom_imports(framework):
    pytest.importorskip(framework, reason=f'{framework} is not installed')
    code = (
        f'from {framework}.registry import MODELS\n'
        'from mmengine.registry import init_default_scope\n'
        'from mmcv.cnn import build_plugin_layer\n'
        'import sys\n'
        'assert "overlock_mm" not in sys.modules\n'
        f'init_default_scope({framework!r})\n'
        f'name, layer = build_plugin_layer(dict(type={TYPE!r}, num_groups=2), postfix=1, in_channels=16)\n'
        'assert (name, layer.num_groups) == ("contmix_block1", 2)\n'
        f'block = MODELS.build(dict(type={TYPE!r}, in_channels=16))\n'
        'assert type(block) is type(layer)\n'
        'print(type(block).__module__)'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == 'overlock_mm.models.contmix_block'


SIZES = [(1, 1), (1, 9), (3, 5), (6, 7), (7, 7), (8, 6), (14, 20), (40, 1)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('settings', [{}, dict(kernel_size=13, small_kernel_size=3, context_size=5)], ids=str)
def test_any_size(settings, size):
    block = trained(12, **settings)
    x = torch.randn(2, 12, *size, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    'channels, groups', [(1, 1), (2, 1), (3, 1), (20, 1), (37, 1), (64, 2), (128, 4), (320, 10), (512, 16), (594, 11)]
)
@torch.no_grad()
def test_any_number_of_channels(channels, groups):
    block = trained(channels)
    assert block.num_groups == groups
    x = torch.randn(1, channels, 8, 9)
    assert block(x).shape == x.shape


@pytest.mark.parametrize('size', [(3, 5), (9, 8)], ids=str)
@torch.no_grad()
def test_the_identity_at_the_start(size):
    x = torch.randn(2, 16, *size)
    assert torch.equal(ContMixBlock(16)(x), x)
    assert not torch.equal(ContMixBlock(16, layer_scale_init_value=0.1)(x), x)


def test_a_gradient_for_every_parameter():
    """None is ever missing; with the first step the scale moves, and with it all others' gradients appear."""
    block = ContMixBlock(16, num_groups=2)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x, target = torch.randn(2, 2, 16, 10, 11)
    for step in range(2):
        optimizer.zero_grad()
        F.mse_loss(block(x), target).backward()
        without = {name for name, p in block.named_parameters() if not p.grad.abs().sum() > 0}
        expected = {n for n, _ in block.named_parameters() if not n.startswith('layer_scale.')} if step == 0 else set()
        assert without == expected
        optimizer.step()
    # A start at another value needs no such step.
    block = ContMixBlock(16, num_groups=2, layer_scale_init_value=1e-2)
    F.mse_loss(block(x), target).backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@torch.no_grad()
def test_uniform_kernels_are_means_of_windows():
    """With W_d at zero, the first half of the channels is the mean of 3 x 3 neighbours and the rest that of 5 x 5."""
    block = ContMixBlock(8, kernel_size=5, small_kernel_size=3, layer_scale_init_value=1.0)
    nn.init.zeros_(block.kernel_proj.weight)
    nn.init.dirac_(block.value.weight)
    nn.init.dirac_(block.proj.weight)
    nn.init.zeros_(block.gate.weight)
    nn.init.constant_(block.gate.bias, 1.2784645)  # SiLU gives 1
    x = torch.randn(2, 8, 9, 11)
    mixed, normed = block(x) - x, block.norm(x)
    for half, values, kernel_size in zip(mixed.chunk(2, dim=1), normed.chunk(2, dim=1), (3, 5)):
        inside = slice(kernel_size // 2, -(kernel_size // 2))
        expected = F.avg_pool2d(values, kernel_size, stride=1)
        assert relative_error(half[..., inside, inside], expected) < 1e-5


def test_kernels_know_of_the_whole_map():
    """A position's output depends on the far end of the map, which no kernel of its own reaches."""
    block = trained(8).double()
    x = torch.randn(1, 8, 40, 40, dtype=torch.float64, requires_grad=True)
    block(x)[0, :, 0, 0].square().sum().backward()
    assert x.grad[0, :, -1, -1].abs().sum() > 0
    nn.init.zeros_(block.kernel_proj.weight)
    x.grad = None
    block(x)[0, :, 0, 0].square().sum().backward()
    assert not x.grad[0, :, 7:].any()


@pytest.mark.parametrize('size', [(4, 5), (9, 10)], ids=str)
def test_gradients(size):
    block = trained(4).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x, fast_mode=True)


@pytest.mark.parametrize('size', [(3, 5), (8, 9)], ids=str)
@torch.no_grad()
def test_memory_layouts(size):
    block = trained(16).eval()
    x = torch.randn(2, 16, *size)
    expected = block(x)
    assert expected.is_contiguous()
    last = torch.channels_last
    out = block.to(memory_format=last)(x.contiguous(memory_format=last))
    assert out.is_contiguous(memory_format=last)
    assert relative_error(out, expected) < 1e-5
    wide = torch.empty(2, 16, size[0], 2 * size[1])[..., ::2].copy_(x)
    assert relative_error(block(wide), expected) < 1e-5


@torch.no_grad()
def test_an_empty_batch():
    """Heads on regions have none at times."""
    for size in ((3, 5), (8, 9)):
        assert ContMixBlock(16)(torch.randn(0, 16, *size)).shape == (0, 16, *size)


@autocast_dtypes
def test_autocast(dtype):
    block = trained(16)
    x = torch.randn(2, 16, 10, 6)
    expected = block(x)
    with torch.autocast('cpu', dtype=dtype):
        out = block(x)
        assert block(x.to(dtype)).dtype == dtype
    assert relative_error(out, expected) < {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize('size', [(3, 5), (8, 9)], ids=str)
def test_compiles_into_one_graph(size):
    block = trained(16)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 16, *size)
    results = []
    for run in (block, compiled):
        block.zero_grad()
        out = run(x)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in block.parameters())])
    for expected, got in zip(*results):
        assert relative_error(got, expected) < 1e-4


@devices
def test_device(device):
    block = trained(16)
    x = torch.randn(1, 16, 9, 9)
    expected = block(x)
    assert relative_error(block.to(device)(x.to(device)).cpu(), expected) < 1e-4


def test_norms():
    assert isinstance(ContMixBlock(16, norm_cfg=dict(type='GN', num_groups=4)).norm, nn.GroupNorm)
    block = ContMixBlock(16, norm_cfg=dict(type='BN', requires_grad=False))
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert not block.norm.weight.requires_grad
    # Nothing of the default depends on other images of a batch, nor on statistics of training.
    block = trained(16).train()
    x = torch.randn(2, 16, 8, 8)
    assert relative_error(block(x)[:1], block.eval()(x[:1])) < 1e-6


def test_initialisation_is_the_blocks_own_below_another_module():
    """A ResNet that starts from nothing initialises all convolutions below it; what init_cfg says comes last."""
    from mmengine.model import BaseModule

    kaiming = [dict(type='Kaiming', layer='Conv2d'), dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm'])]
    parent = BaseModule(kaiming)
    parent.block = ContMixBlock(256, norm_cfg=dict(type='BN'))
    parent.other = ContMixBlock(256, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
    parent.init_weights()
    assert parent.block.value.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert not parent.block.layer_scale.weight.any()
    assert (parent.other.value.weight == 0.5).all()


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
def test_in_a_resnet(framework):
    """Named after the block, in the stages that were asked for, and without an effect until it is trained."""
    models = pytest.importorskip(f'{framework}.models', reason=f'this is the ResNet of {framework}')
    settings = dict(depth=50, base_channels=8, stem_channels=8, norm_eval=True)
    plain = models.ResNet(**settings)
    plain.init_weights()
    with_blocks = models.ResNet(**settings, plugins=PLUGINS)
    with_blocks.init_weights()
    result = with_blocks.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert {'.'.join(name.split('.')[:3]) for name in result.missing_keys} == {
        f'layer{stage}.{i}.contmix_block' for stage, blocks in ((2, 4), (3, 6), (4, 3)) for i in range(blocks)
    }
    x = torch.randn(2, 3, 75, 64)
    plain.eval()
    with_blocks.train()
    for expected, got in zip(plain(x), with_blocks(x)):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(in_channels=0), 'in_channels must be a positive int, got 0'),
        (dict(in_channels='8'), "in_channels must be a positive int, got '8'"),
        (dict(num_groups=5), r'num_groups: 2 \* num_groups must divide the 16 channels, got 5'),
        (dict(num_groups=0), 'num_groups must be a positive int, got 0'),
        (dict(num_groups=2.0), 'num_groups must be a positive int, got 2.0'),
        (dict(kernel_size=8), 'kernel_size must be odd, got 8'),
        (dict(kernel_size=(7, 7)), r'kernel_size must be a positive int, got \(7, 7\)'),
        (dict(small_kernel_size=4), 'small_kernel_size must be odd, got 4'),
        (dict(small_kernel_size=9), 'small_kernel_size must be at most kernel_size = 7, got 9'),
        (dict(context_size=0), 'context_size must be a positive int, got 0'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ContMixBlock(**{'in_channels': 16, **settings})


@pytest.mark.parametrize('shape', [(1, 8, 9, 9), (16, 9, 9), (1, 16, 0, 9)], ids=str)
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r'the input must have shape \(B, 16, H, W\), got \('):
        ContMixBlock(16)(torch.randn(shape))


def test_integers_of_numpy():
    block = ContMixBlock(np.int64(32), kernel_size=np.int32(7), num_groups=np.int64(2), context_size=np.uint8(7))
    assert repr(block) == repr(ContMixBlock(32, kernel_size=7, num_groups=2, context_size=7))
    assert block(torch.randn(1, 32, 5, 6)).shape == (1, 32, 5, 6)
