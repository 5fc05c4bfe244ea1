"""Models that users have changed: hooks, replaced and fused layers, other norms. What is fast must not pass them over."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from conftest import relative_error
from test_reparam import randomise_statistics
from torch import Tensor

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock
from overlock_mm.models.reparam import DilatedReparamConv


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


@pytest.mark.parametrize('deploy', [False, True])
def test_hooks_count_at_inference(deploy):
    x = torch.randn(2, 16, 9, 10, dtype=torch.float64)
    for index in range(9):
        hooked = make_basic().eval()
        randomise_statistics(hooked)
        if deploy:
            hooked.proj[1].switch_to_deploy()
            hooked.switch_to_deploy()
        wrapped = copy.deepcopy(hooked)
        hooked.proj[index].register_forward_hook(bend)
        wrapped.proj[index] = Bent(wrapped.proj[index])
        with torch.no_grad():
            assert relative_error(hooked(x), wrapped(x)) < 1e-12, index


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
    from overlock_mm.models import folding, reparam

    backbone = OverLoCK(small_arch).eval()
    folds = []
    monkeypatch.setattr(reparam, '_one_kernel', lambda *args, fold=reparam._one_kernel: folds.append(1) or fold(*args))
    monkeypatch.setattr(folding, '_fold', lambda *args, fold=folding._fold: folds.append(1) or fold(*args))
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
