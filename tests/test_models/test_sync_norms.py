"""Synchronised norms: three processes with parts of a batch against one process with the whole batch.

The processes talk through gloo, on the CPU. Their parts have other numbers of images and, of single layers, other sizes of
maps. Processes 0 and 1 also have a group of their own; then 2 is alone in its one.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
from conftest import KeptBytes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from overlock_mm.models import OverLoCK
from overlock_mm.models.economy import lean
from overlock_mm.models.norms import SyncBatchNorm
from overlock_mm.models.reparam import DilatedReparamConv
from overlock_mm.ops.sync_norms import sync_batch_norm
from overlock_mm.training.norms import convert_sync_norms, restore_sync_norms

PROCESSES = 3
GROUPS = dict(whole=(0, 1, 2), pair=(0, 1), alone=(2,))


def seeded(function, *args, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function(*args, **kwargs)


def randn(*shape, seed=1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------- cases


def norm(channels=5, kind=nn.BatchNorm2d, **settings):
    layer = kind(channels, **settings).double()
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = randn(channels, seed=10 + i)
    return layer


def dilated(kernel_size, momentum=0.1, frozen=False):
    layer = seeded(DilatedReparamConv, 5, kernel_size).double()
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, each in enumerate(norms):
        each.weight.data, each.bias.data = randn(5, seed=20 + i), randn(5, seed=40 + i)
        each.momentum = momentum
        each.requires_grad_(not frozen)
    return layer


def with_a_hook(kernel_size):
    """Its norms are called, each by itself."""
    layer = dilated(kernel_size)
    layer.lk_origin.register_forward_hook(do_nothing)
    return layer


def do_nothing(module, inputs, out):
    return None


def backbone(**settings):
    model = seeded(OverLoCK, ARCH, out_type='pyramid_with_overview', drop_path_rate=0.0, **settings).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * randn(*parameter.shape, seed=i)
    return model


ARCH = dict(channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 4), kernel_sizes=(9, 7, 7, 5))

MAPS = [(3, 5, 9, 11), (1, 5, 6, 5), (2, 5, 8, 3)]
IMAGES = [(3, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 64)]

#: Builder, shapes of the parts.
LAYERS = {
    'norm': (norm, MAPS),
    'norm of the average of all batches': (functools.partial(norm, momentum=None), MAPS),
    'norm without parameters': (functools.partial(norm, affine=False), MAPS),
    'norm without running statistics': (functools.partial(norm, track_running_stats=False), MAPS),
    'norm of features': (functools.partial(norm, kind=nn.BatchNorm1d), [(4, 5), (1, 5), (2, 5)]),
    'norm of sequences': (functools.partial(norm, kind=nn.BatchNorm1d), [(4, 5, 3), (1, 5, 3), (2, 5, 9)]),
    'norm of volumes': (functools.partial(norm, kind=nn.BatchNorm3d), [(1, 5, 3, 2, 4), (2, 5, 3, 2, 4), (1, 5, 1, 2, 3)]),
    'norm of nothing in process 0': (norm, [(0, 5, 9, 11), *MAPS[1:]]),
    'norm of nothing in process 2': (norm, [*MAPS[:2], (2, 5, 0, 4)]),
    'norm of one value in each process': (norm, [(1, 5, 1, 1)] * 3),
    'dilated 5': (functools.partial(dilated, 5), MAPS),
    'dilated 9': (functools.partial(dilated, 9), MAPS),
    'dilated 17': (functools.partial(dilated, 17), MAPS),
    'dilated, averages of all batches': (functools.partial(dilated, 7, momentum=None), MAPS),
    'dilated with frozen norms': (functools.partial(dilated, 7, frozen=True), MAPS),
    'dilated with a hook': (functools.partial(with_a_hook, 7), MAPS),
    'dilated, nothing in process 0': (functools.partial(dilated, 7), [(0, 5, 9, 11), *MAPS[1:]]),
}
BACKBONES = {
    'lean': dict(),
    'fast': dict(memory='fast'),
    'with_cp': dict(with_cp=True),
    'with_cp of a stage': dict(with_cp=['blocks1']),
    'frozen stages': dict(frozen_stages=2),
    'norm_eval': dict(norm_eval=True),
}
CASES = {**LAYERS, **{name: (functools.partial(backbone, **settings), IMAGES) for name, settings in BACKBONES.items()}}
CASES_OF_GROUPS = ['norm', 'dilated 9', 'lean']
STEPS = 2


def part(name: str, rank: int) -> Tensor:
    return randn(*CASES[name][1][rank], seed=100 + rank).requires_grad_()


def loss_of(outputs: list[Tensor], rank: int) -> Tensor:
    return sum((each * randn(*each.shape, seed=1000 * rank + i)).sum() for i, each in enumerate(outputs))


def as_list(outputs) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def gradients_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f'gradient of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {f'buffer {name}': each for name, each in model.named_buffers()}


# ----------------------------------------------------------------------------------------------------- three processes


def run_part(model: nn.Module, name: str, rank: int) -> dict[str, Tensor]:
    """Steps without an optimizer; gradients add up."""
    found, x = {}, part(name, rank)
    model.train()
    for step in range(STEPS):
        outputs = as_list(model(x * (1 + step)))
        loss_of(outputs, rank).backward()
        found |= {f'{step} output {i}': each.detach() for i, each in enumerate(outputs)}
    return {**found, 'gradient of x': x.grad, **gradients_and_buffers(model)}


@contextlib.contextmanager
def counted_exchanges():
    counts = collections.Counter()

    def count(function):
        @functools.wraps(function)
        def counting(*args, **kwargs):
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        return counting

    with contextlib.ExitStack() as stack:
        for name in ('all_gather_into_tensor', 'all_gather', 'all_reduce', 'broadcast', 'barrier'):
            stack.enter_context(mock.patch.object(dist, name, count(getattr(dist, name))))
        yield counts


def synchronised(name: str, group=None) -> nn.Module:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(CASES[name][0](), group)
    # torch's norms of branches are known too, and raise an error on the CPU where they are called.
    return model if name.startswith('dilated') and 'hook' not in name else convert_sync_norms(model)


def run_all_parts(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=PROCESSES)
    groups = {name: dist.new_group(ranks) for name, ranks in GROUPS.items()}
    for group, names in dict(whole=list(CASES), pair=CASES_OF_GROUPS, alone=CASES_OF_GROUPS).items():
        for name in names if rank in GROUPS[group] else ():
            with counted_exchanges() as counts:
                found = run_part(synchronised(name, None if group == 'whole' else groups[group]), name, rank)
            torch.save((found, dict(counts)), f'{folder}/{group}-{name}-{rank}.pth')
    # On the CPU, DDP refuses torch's SyncBatchNorm and what is derived from it, when it is made.
    model = DistributedDataParallel(CASES['lean'][0]())
    found = run_part(convert_sync_norms(nn.SyncBatchNorm.convert_sync_batchnorm(model)), 'lean', rank)
    torch.save(({key.replace('module.', ''): each for key, each in found.items()}, {}), f'{folder}/ddp-lean-{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """With the results of all processes."""
    folder = tmp_path_factory.mktemp('processes')
    torch.multiprocessing.spawn(run_all_parts, (str(folder),), nprocs=PROCESSES)
    return folder


# --------------------------------------------------------------------------------------------------------- one process


def norm_of_parts(norm: nn.Module, parts: list[Tensor]) -> list[Tensor]:
    """The batch is that of all parts, of whatever sizes."""
    norm.__class__ = nn.BatchNorm1d
    values = [each.transpose(0, 1).flatten(1).t() for each in parts]  # (values, C)
    normed = norm(torch.cat(values)).split([len(each) for each in values])
    return [
        each.t().reshape(part.shape[1], part.shape[0], *part.shape[2:]).transpose(0, 1) for each, part in zip(normed, parts)
    ]


def call_with_parts(model: nn.Module, parts: list[Tensor]) -> list[list[Tensor]]:
    """The outputs of each part."""
    if isinstance(model, DilatedReparamConv):
        branches = [norm_of_parts(norm, [conv(each) for each in parts]) for conv, norm in model.branches()]
        return [[sum(each)] for each in zip(*branches)]
    if isinstance(model, OverLoCK):
        outputs = [each.split([len(x) for x in parts]) for each in model(torch.cat(parts))]
        return [list(each) for each in zip(*outputs)]
    return [[each] for each in norm_of_parts(model, parts)]


@functools.cache
def one_process(name: str, ranks: tuple[int, ...]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Gradients and buffers; what each part alone has."""
    model = CASES[name][0]().train()
    parts = {rank: part(name, rank) for rank in ranks}
    of_parts = {rank: {} for rank in ranks}
    for step in range(STEPS):
        outputs = call_with_parts(model, [each * (1 + step) for each in parts.values()])
        sum(loss_of(each, rank) for each, rank in zip(outputs, ranks)).backward()
        for each, rank in zip(outputs, ranks):
            of_parts[rank] |= {f'{step} output {i}': out.detach() for i, out in enumerate(each)}
    for rank, x in parts.items():
        of_parts[rank]['gradient of x'] = x.grad
    return gradients_and_buffers(model), of_parts


def load(folder: Path, group: str, name: str, rank: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    return torch.load(folder / f'{group}-{name}-{rank}.pth')


def assert_close(got: Tensor, expected: Tensor, message: str) -> None:
    # Some gradients are zero in exact arithmetic, such as that of a bias before a norm.
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f'{message}: {text}')


ALL = [
    *(('whole', name) for name in CASES),
    *((group, name) for group in ('pair', 'alone') for name in CASES_OF_GROUPS),
]


@pytest.mark.parametrize('group, name', ALL)
def test_several_processes_equal_one(folder, group, name):
    ranks = GROUPS[group]
    expected, of_parts = one_process(name, ranks)
    found = {rank: load(folder, group, name, rank)[0] for rank in ranks}
    for rank in ranks:
        assert found[rank].keys() == {*expected, *of_parts[rank]}
        for key, value in of_parts[rank].items():
            assert_close(found[rank][key], value, f'process {rank}, {key}')
    for key, value in expected.items():
        if key.startswith('buffer'):
            for rank in ranks:
                assert_close(found[rank][key], value, f'process {rank}, {key}')
        else:
            assert_close(sum(found[rank][key] for rank in ranks), value, key)


def test_ddp_averages_the_gradients(folder):
    expected, _ = one_process('lean', GROUPS['whole'])
    for rank in range(PROCESSES):
        found, _ = load(folder, 'ddp', 'lean', rank)
        for key in expected:
            if key.startswith('gradient'):
                assert_close(PROCESSES * found[key], expected[key], key)


@pytest.mark.parametrize('name', ['norm', 'dilated 9'])
def test_gradients_of_parameters_are_the_share_of_the_process(folder, name):
    """As those of torch's SyncBatchNorm: of a bias, the sum of the gradients in this process."""
    for rank in range(PROCESSES):
        shape = CASES[name][1][rank]
        share = STEPS * randn(*shape, seed=1000 * rank).sum(dim=(0, 2, 3))
        found, _ = load(folder, 'whole', name, rank)
        biases = [value for key, value in found.items() if key.endswith('bias') and key.startswith('gradient')]
        assert len(biases) == (1 if name == 'norm' else 6)
        for bias in biases:
            assert_close(bias, share, f'process {rank}')


def units(model: nn.Module) -> list[nn.Module]:
    """What exchanges statistics: layers of branches, and all other norms in training."""
    layers = [module for module in model.modules() if isinstance(module, DilatedReparamConv)]
    branches = [layer for layer in layers if layer.origin_bn.training]
    inside = {norm for layer in branches for norm in layer.modules()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    return branches + [norm for norm in norms if norm not in inside]


@pytest.mark.parametrize('name', sorted(BACKBONES))
def test_exchanges_of_a_step(folder, name):
    """One forward and one backward of each unit. Checkpointed blocks exchange again in their second run."""
    model = backbone(**BACKBONES[name]).train()
    again = dict(with_cp=[n for n, _ in model.named_children() if 'blocks' in n]).get(name, [])
    again += ['blocks1'] * (name == 'with_cp of a stage')
    forward = len(units(model))
    assert forward == 0 if name == 'norm_eval' else forward > 10
    second = sum(len(units(getattr(model, each))) for each in again)
    for rank in range(PROCESSES):
        _, counts = load(folder, 'whole', name, rank)
        expected = dict(all_gather_into_tensor=STEPS * (forward + second), all_reduce=STEPS * forward)
        assert counts == {key: number for key, number in expected.items() if number}


def test_a_layer_of_branches_exchanges_once(folder):
    for name, number in (('dilated 9', 1), ('dilated 17', 1), ('dilated with a hook', 5)):
        _, counts = load(folder, 'whole', name, 0)
        assert counts == dict(all_gather_into_tensor=STEPS * number, all_reduce=STEPS * number)


def test_one_process_in_the_group_exchanges_nothing(folder):
    for name in CASES_OF_GROUPS:
        assert load(folder, 'alone', name, 2)[1] == {}


def test_policies_have_the_same_bits(folder):
    """An output that is made again comes from the statistics of the first time."""
    for rank in range(PROCESSES):
        results = [load(folder, 'whole', name, rank)[0] for name in ('fast', 'lean', 'with_cp')]
        for got in results[1:]:
            assert [key for key, value in results[0].items() if not torch.equal(got[key], value)] == []


# ------------------------------------------------------------------------------------------------------- without others


def is_same(got: nn.Module, expected: nn.Module, *shape: int) -> bool:
    """Output, gradients and buffers, to the bit."""
    results = []
    for model in (got, expected):
        x = randn(*shape).requires_grad_()
        outputs = as_list(model(x))
        loss_of(outputs, 0).backward()
        results.append([*outputs, x.grad, *gradients_and_buffers(model).values()])
    return all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', ['norm', 'norm of the average of all batches', 'dilated 9', 'lean'])
def test_without_a_group_they_are_batch_norms(name, training):
    build, shapes = CASES[name]
    expected = build().train(training)
    assert is_same(synchronised(name).train(training), expected, *shapes[0])


def test_in_evaluation_they_are_batch_norms():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.object(dist, 'get_world_size', lambda group=None: 2):
            for name in ('norm', 'dilated 9'):
                assert is_same(synchronised(name).eval(), CASES[name][0]().eval(), *MAPS[0])
    finally:
        dist.destroy_process_group()


def test_an_output_is_made_again_without_an_exchange():
    """The lean policy does not keep it, and makes it with the same bits."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, weight, bias = (randn(*shape).requires_grad_() for shape in ((2, 5, 30, 31), (5,), (5,)))
        running = torch.zeros(5).double(), torch.ones(5).double()
        with KeptBytes() as storages, lean():
            y = sync_batch_norm(x, *running, weight, bias, 0.1, 1e-5)
            out = y.square()
        copied, updated = y.detach().clone(), [each.clone() for each in running]
        del y
        assert storages.count(x, weight, bias, *running) < 1.1 * out.nbytes  # out, and not y
        with counted_exchanges() as counts:
            again = out.grad_fn._saved_self
            assert counts == {}
            out.sum().backward()
            assert counts == dict(all_reduce=1)
        assert torch.equal(again, copied)
        assert all(torch.equal(*pair) for pair in zip(running, updated))
    finally:
        dist.destroy_process_group()


def test_conversion_changes_the_class_alone():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(backbone(), nn.BatchNorm1d(3)))
    model[1].register_forward_hook(do_nothing)
    modules, tensors = dict(model.named_modules()), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names, kinds = list(model.state_dict()), [type(module) for module in modules.values()]
    assert nn.SyncBatchNorm in kinds
    assert convert_sync_norms(model) is model
    assert {type(module) for module in model.modules() if isinstance(module, nn.SyncBatchNorm)} == {SyncBatchNorm}
    for each in (convert_sync_norms(model), copy.deepcopy(model)):
        assert list(each.state_dict()) == names
        assert len(each[1]._forward_hooks) == 1
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == tensors.keys() and all(after[name] is each for name, each in tensors.items())
    assert restore_sync_norms(model) is model
    assert [type(module) for module in model.modules()] == kinds


def test_derived_classes_are_left_alone():
    class Derived(nn.SyncBatchNorm):
        pass

    model = convert_sync_norms(nn.Sequential(Derived(3), nn.BatchNorm2d(3)))
    assert [type(module) for module in model] == [Derived, nn.BatchNorm2d]


@pytest.mark.parametrize('function', [convert_sync_norms, restore_sync_norms])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got dict'):
        function({})
