"""Runs that are killed with SIGKILL and resumed end with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.dataset import worker_init_fn
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner

from overlock_mm.models import OverLoCK
from overlock_mm.resume import RandomStateHook, get_random_states, set_random_states

ARCH = dict(channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 4), kernel_sizes=(9, 7, 7, 5))


def draw():
    """Random numbers of every library, and of every kind that it keeps one of."""
    normal = np.random.normal()  # noqa: NPY002 (of the global generator)
    return torch.rand(1).item(), random.random(), random.gauss(0, 1), normal


@MODELS.register_module(force=True)
class Classifier(BaseModel):
    """Draws random numbers of torch: drop path."""

    def __init__(self):
        super().__init__()
        self.backbone = OverLoCK(ARCH, drop_path_rate=0.5)
        self.head = nn.Linear(self.backbone.out_channels[-1], 1)

    def forward(self, inputs, mode):
        out = self.head(self.backbone(torch.stack(inputs))[-1].mean((2, 3)))
        return dict(loss=(out - 1).square().mean()) if mode == 'loss' else out


@DATASETS.register_module(force=True)
class NoisyPictures(torch.utils.data.Dataset):
    """Draws random numbers of all three libraries, in the workers if there are some."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), float(index)) + sum(draw()))


class Growing(BaseMetric):
    """Every score is the best one, so every validation writes the latest checkpoint a second time."""

    def process(self, data_batch, data_samples):
        self.results += [draw()]

    def compute_metrics(self, results):
        return dict(growing=time.time())


class Kill(Hook):
    """Kills the process in an iteration of training."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(number):
    """Let the process be killed when half of its checkpoint with this number is written."""
    written = []

    def put(self, obj, filepath):
        written.append(filepath)
        if len(written) == number:
            original(self, obj[: len(obj) // 2], filepath)
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, obj, filepath)

    original, LocalBackend.put = LocalBackend.put, put


def train(work_dir, by_epoch=True, workers=0, seed=None, resume=False, kill=None, write=None, rank=None):
    """Train for 12 iterations, 3 epochs, with a checkpoint and a validation after every 4."""
    torch.set_num_threads(1)
    Runner._log_env = lambda self, env: None  # it runs compilers, for seconds
    if write is not None:
        kill_in_write(write)
    if rank is not None:
        store = f'file://{work_dir}-{resume}-store'
        torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    data = dict(batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    Runner(
        dict(type='Classifier'),
        str(work_dir),
        train_dataloader=dict(data, dataset=dict(type='NoisyPictures', length=8), sampler=sampler),
        train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch else dict(by_epoch=False, max_iters=12, val_interval=4),
        val_dataloader=dict(
            data, dataset=dict(type='NoisyPictures', length=4), sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        val_cfg=dict(),
        val_evaluator=[Growing()],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='LinearLR', begin=0, end=9, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=1 if by_epoch else 4, by_epoch=by_epoch, save_best='growing', rule='greater'
            ),
            random_state=dict(type='overlock_mm.RandomStateHook'),
        ),
        custom_hooks=[dict(type='EMAHook'), *([kill] if kill else [])],
        randomness=dict(seed=seed, diff_rank_seed=rank is not None),
        resume=resume,
        default_scope='mmengine',
        experiment_name=str(random.random()),
        log_level='WARNING',
    ).train()


#: What a run imports, which takes longer than the run.
IMPORTED_LATER = ['matplotlib.pyplot', 'mmcv.ops', 'overlock_mm.inference', 'torch._dynamo']


@pytest.fixture(scope='module')
def processes():
    """Processes that start with this file imported, from a server that nobody else uses."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, *IMPORTED_LATER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # the server takes it from here
        context.Process(target=int).start()
    return context


def run(processes, *args, ranks=(None,), **kwargs):
    """Return the exit code of a run in a process of its own, or in several."""
    started = [processes.Process(target=train, args=args, kwargs=dict(kwargs, rank=rank)) for rank in ranks]
    for process in started:
        process.start()
    for process in started:
        process.join()
    (code,) = {process.exitcode for process in started}
    return code


def different_tensors(folder: Path, other: Path, last: str) -> list[str]:
    """Names of the tensors that differ between two checkpoints, of weights, averaged weights and optimizers."""

    def tensors(value, name):
        if isinstance(value, torch.Tensor):
            return {name: value}
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {key: each for inner, found in items for key, each in tensors(found, f'{name}.{inner}').items()}

    states = []
    for each in (folder, other):
        checkpoint = torch.load(each / last, weights_only=True)
        states.append(tensors({part: checkpoint[part] for part in ('state_dict', 'ema_state_dict', 'optimizer')}, ''))
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 300
    return [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


SECOND, LAST = {True: 'epoch_2.pth', False: 'iter_8.pth'}, {True: 'epoch_3.pth', False: 'iter_12.pth'}
KILLED = -signal.SIGKILL


@pytest.mark.parametrize('by_epoch, workers', [(True, 2), (False, 0), (False, 2)])
def test_a_killed_run_is_resumed_exactly(processes, tmp_path, by_epoch, workers):
    """The first kill is in an epoch. The second one is in a validation, which writes the latest checkpoint again.

    The resumed runs have no seed in their configs: they take that of the checkpoint.
    """
    train = functools.partial(run, processes, by_epoch=by_epoch, workers=workers)
    assert train(tmp_path / 'undisturbed', seed=3) == 0
    folder = tmp_path / 'killed'
    assert train(folder, seed=3, kill=Kill(5)) == KILLED
    assert train(folder, resume=True, write=3) == KILLED
    assert (folder / 'last_checkpoint').read_text() == str(folder / SECOND[by_epoch])
    assert not (folder / LAST[by_epoch]).exists()
    assert train(folder, resume=True) == 0
    assert different_tensors(folder, tmp_path / 'undisturbed', LAST[by_epoch]) == []


def test_each_process_has_its_states(processes, tmp_path):
    """The first process writes the states of both. They have other seeds, so their states differ."""
    train = functools.partial(run, processes, ranks=(0, 1), seed=3)
    assert train(tmp_path / 'undisturbed') == 0
    assert train(tmp_path / 'killed', kill=Kill(3)) == KILLED
    assert train(tmp_path / 'killed', resume=True) == 0
    expected, got = (torch.load(tmp_path / name / 'epoch_3.pth')['random_states'] for name in ('undisturbed', 'killed'))
    assert len(expected) == len(got) == 2
    assert not same(expected[0], expected[1])
    for rank in (0, 1):
        assert same(got[rank], expected[rank])


def same(states, others):
    return all(
        torch.equal(states[name], others[name]) if name == 'torch' else states[name] == others[name] for name in states
    )


@pytest.mark.skipif(not hasattr(torch.serialization, 'clear_safe_globals'), reason='torch < 2.5 has no safe globals')
def test_states_are_plain_and_whole(tmp_path):
    """Also in the middle of a pair of normal numbers, of which Python and numpy keep the second one."""
    draw()
    torch.save(get_random_states(), tmp_path / 'states.pth')
    expected = draw()
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        states = torch.load(tmp_path / 'states.pth', weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert draw() != expected
    set_random_states(states)
    assert draw() == expected


def test_states_of_gpus(monkeypatch):
    """A checkpoint may be loaded to a GPU, and setters take tensors of the CPU. No GPU runs here."""
    set_to = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: [torch.ones(16), torch.zeros(16)])
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', set_to.extend)
    states = get_random_states()
    assert len(states['cuda']) == 2
    set_random_states(states)
    assert [state.sum() for state in set_to] == [16, 0]


class FakeRunner:
    """What the hook reads when it resumes."""

    iter, seed, hooks = 8, 3, ()

    def __init__(self):
        self.logger = self
        self.messages = []
        self.train_loop = self
        self.dataloader = [None] * 4

    def warning(self, message):
        self.messages.append(message)


def resumed(checkpoint, **settings):
    """Messages of a resumed run, and the random numbers that come first in it."""
    hook, runner = RandomStateHook(), FakeRunner()
    vars(runner).update(settings)
    hook.before_run(runner)
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    if hook._to_set is not None:
        set_random_states(hook._to_set)
    return runner.messages, draw()


def test_warnings():
    states = get_random_states()
    expected = draw()
    assert resumed(dict(random_states=[states])) == ([], expected)
    assert resumed(dict(random_states=[states]), iter=0)[1] != expected  # weights only were loaded

    (message,), numbers = resumed({})
    assert 'The checkpoint has no random states' in message
    assert numbers != expected
    (message,), numbers = resumed(dict(random_states=[states] * 8))
    assert 'random states of 8 processes, but this run has 1' in message
    assert numbers != expected
    gpus = torch.cuda.device_count() + 1
    (message,), numbers = resumed(dict(random_states=[{**states, 'cuda': [torch.zeros(16)] * gpus}]))
    assert f'random states of {gpus} GPUs, but this process has {gpus - 1}' in message
    assert numbers == expected
    (message,), _ = resumed(dict(random_states=[states]), iter=7)
    assert 'in the middle of an epoch' in message
    (message,), _ = resumed(dict(random_states=[states]), hooks=[CheckpointHook(max_keep_ckpts=1)])
    assert 'set max_keep_ckpts=2' in message


def test_workers_have_other_seeds_in_each_epoch():
    """mmengine gives new workers the same seeds again. Those of an epoch are the same in every run."""

    def epochs(numbers):
        seeds = functools.partial(worker_init_fn, num_workers=2, rank=0, seed=3)
        loader = torch.utils.data.DataLoader(
            NoisyPictures(2), num_workers=2, persistent_workers=True, worker_init_fn=seeds, collate_fn=list
        )
        hook, runner = RandomStateHook(), FakeRunner()
        runner.dataloader = loader
        for runner.epoch in numbers:
            hook.before_train_epoch(runner)
            yield [(picture['inputs'] - index)[0, 0, 0].item() for index, (picture,) in enumerate(loader)]

    first, second, third = epochs([0, 1, 2])
    assert len({*first, *second, *third}) == 6
    assert list(epochs([2, 1])) == [third, second]


def test_without_a_local_folder():
    """A remote backend writes a file under its final name."""
    saved = []

    class Remote(FakeRunner):
        def save_checkpoint(self, out_dir, filename, **kwargs):
            saved.append((out_dir, filename))

    runner = Remote()
    RandomStateHook().before_train(runner)
    runner.save_checkpoint('http://somewhere', 'epoch_1.pth')
    assert saved == [('http://somewhere', 'epoch_1.pth')]
