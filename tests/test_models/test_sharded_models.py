"""DDP and FSDP with gloo on the CPU: the same loss, gradients and steps, whatever autograd keeps.

In one process FSDP is of whole blocks and of layers. In two processes a batch is split: a step equals one with the whole
batch in one process.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
from conftest import KeptBytes, relative_error
from torch.nn.parallel import DistributedDataParallel

from overlock_mm.inference import optimize
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


@needs_fully_shard
@pytest.mark.parametrize('kinds', [(nn.Conv2d,), ()], ids=str)
def test_a_sharded_model_is_not_optimized(small_arch, one_process, kinds):
    with pytest.raises(ValueError, match='model must not be sharded by FSDP, got .*OverLoCK: gather its weights first'):
        optimize(fully_shard(build(small_arch), kinds))


def test_a_wrapped_model_is_not_optimized(small_arch, one_process):
    sharded = fsdp.FullyShardedDataParallel(build(small_arch), device_id=torch.device('cpu'))
    for model in (sharded, nn.Sequential(sharded)):
        with pytest.raises(ValueError, match='model must not be sharded by FSDP'):
            optimize(model)


# --------------------------------------------------------------------------------------------------------- two processes

# Batch norms are at rest: half a batch has other statistics, and torch's SyncBatchNorm needs a GPU. Drop path is off. So
# the loss of a batch is the mean of those of its halves, in exact arithmetic, and so are the gradients.
SETTINGS = dict(
    plain=dict(),
    frozen=dict(frozen_stages=2),
    checkpointed=dict(with_cp=True),
)
STEPS = 2


def wrap_by_size(backbone):
    policy = functools.partial(fsdp.wrap.size_based_auto_wrap_policy, min_num_params=2000)
    return fsdp.FullyShardedDataParallel(
        backbone, auto_wrap_policy=policy, device_id=torch.device('cpu'), use_orig_params=True
    )


WRAPPERS = dict(
    ddp=DistributedDataParallel,
    fsdp_by_size=wrap_by_size,
    fully_shard_layers=functools.partial(fully_shard, kinds=(nn.Conv2d,)),
    fully_shard_blocks=functools.partial(fully_shard, kinds=(BasicBlock, DynamicBlock)),
)
CASES = [
    *(('ddp', name) for name in SETTINGS),
    # No checkpoints: torch cannot run a FullyShardedDataParallel again without reentrant autograd (CheckpointError).
    *(('fsdp_by_size', name) for name in ('plain', 'frozen')),
    ('fully_shard_layers', 'checkpointed'),
    *(('fully_shard_blocks', name) for name in SETTINGS),
]


def whole(tensor):
    return getattr(tensor, 'full_tensor', lambda: tensor)().detach().clone()


def train(arch, settings, wrapper, x):
    """Loss and gradients of each step, and the weights after the last one."""
    model = wrapper(build(arch, norm_eval=True, out_type='pyramid_with_overview', **settings).train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    found = {}

    def add(step, name, tensor):
        found[step, name.replace('_fsdp_wrapped_module.', '').removeprefix('module.')] = whole(tensor)

    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(each.square().mean() for each in model(x))
        loss.backward()
        found[step, 'loss'] = loss.detach()
        with unsharded(model):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    add(step, name, parameter.grad)
        optimizer.step()
    with unsharded(model):
        for name, parameter in model.named_parameters():
            add('after', name, parameter)
    return found


def unsharded(model):
    if isinstance(model, fsdp.FullyShardedDataParallel):
        return fsdp.FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    return contextlib.nullcontext()


def train_half(rank, folder, arch, x):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    for wrapper, name in CASES:
        found = train(arch, SETTINGS[name], WRAPPERS[wrapper], x.chunk(2)[rank])
        for step in range(STEPS):
            dist.all_reduce(found[step, 'loss'])
            found[step, 'loss'] /= 2
        torch.save(found, f'{folder}/{wrapper}-{name}-{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def images():
    return torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def two_processes(small_arch, images, tmp_path_factory) -> Path:
    """Folder with the results of both processes, of each wrapper with each setting."""
    folder = tmp_path_factory.mktemp('two_processes')
    torch.multiprocessing.spawn(train_half, (str(folder), small_arch, images), nprocs=2)
    return folder


@needs_fully_shard
@pytest.mark.parametrize('wrapper, name', CASES)
def test_two_processes_equal_one(small_arch, two_processes, images, wrapper, name):
    expected = train(small_arch, SETTINGS[name], lambda backbone: backbone, images)
    assert {key[0] for key in expected} == {0, 1, 'after'}
    for rank in (0, 1):
        got = torch.load(two_processes / f'{wrapper}-{name}-{rank}.pth')
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(got[key], value, rtol=1e-9, atol=1e-13), key
