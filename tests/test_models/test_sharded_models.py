"""FSDP, of whole blocks and of layers: the same loss and gradients, whatever autograd keeps. One process, with gloo."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import KeptBytes, relative_error

from overlock_mm.models import OverLoCK
from overlock_mm.models.blocks import BasicBlock, DynamicBlock

fsdp = pytest.importorskip('torch.distributed.fsdp')
needs_fully_shard = pytest.mark.skipif(not hasattr(fsdp, 'fully_shard'), reason='torch < 2.6 has no fully_shard there')


@pytest.fixture
def one_process():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(arch, **settings) -> OverLoCK:
    torch.manual_seed(0)
    backbone = OverLoCK(arch, **settings).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return backbone


def fully_shard(backbone, kinds):
    for module in list(backbone.modules()):
        if isinstance(module, kinds):
            fsdp.fully_shard(module)
    return fsdp.fully_shard(backbone)


def gradients(model, x):
    model(x)[0].square().mean().backward()
    return {name: getattr(p.grad, 'full_tensor', lambda grad=p.grad: grad)() for name, p in model.named_parameters()}


@needs_fully_shard
@pytest.mark.parametrize(
    'kinds', [(nn.Conv2d,), (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm), (BasicBlock, DynamicBlock), ()], ids=str
)
@pytest.mark.parametrize('settings', [dict(), dict(memory='fast'), dict(with_cp=True)], ids=str)
def test_fully_shard(small_arch, one_process, kinds, settings):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = gradients(build(small_arch), x)
    got = gradients(fully_shard(build(small_arch, **settings), kinds), x)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize('memory', ['lean', 'fast'])
def test_wrapping_by_size(small_arch, one_process, memory):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    backbone = build(small_arch)
    expected = backbone(x)[0].square().mean()
    expected.backward()
    policy = functools.partial(fsdp.wrap.size_based_auto_wrap_policy, min_num_params=200)
    sharded = fsdp.FullyShardedDataParallel(
        build(small_arch, memory=memory), auto_wrap_policy=policy, device_id=torch.device('cpu'), use_orig_params=True
    )
    assert sum(isinstance(module, fsdp.FullyShardedDataParallel) for module in sharded.modules()) > 10
    loss = sharded(x)[0].square().mean()
    loss.backward()
    assert relative_error(loss, expected) < 1e-12
    total = sum(p.grad.square().sum() for p in sharded.parameters() if p.grad is not None)
    assert relative_error(total, sum(p.grad.square().sum() for p in backbone.parameters() if p.grad is not None)) < 1e-8


@needs_fully_shard
def test_sharded_blocks_stay_lean(small_arch, one_process):
    """FSDP of whole blocks has their weights at hand in their backward."""
    x = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    kept = {}
    for kinds, memory in (((BasicBlock, DynamicBlock), 'lean'), ((BasicBlock, DynamicBlock), 'fast')):
        model = fully_shard(build(small_arch, memory=memory), kinds)
        model(x)[0].sum().backward()
        with KeptBytes() as storages:
            out = model(x)[0]
            kept[memory] = storages.count()
        assert out.requires_grad
    assert kept['lean'] < 0.7 * kept['fast']
