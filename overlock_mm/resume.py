"""Resuming a run that was killed, as if it had not been: random states in checkpoints, and no checkpoint that is cut."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from .registry import HOOKS

#: Name of the random states in a checkpoint: a list with those of each process.
KEY = 'random_states'


def get_random_states() -> dict[str, Any]:
    """States of this process's generators: Python's, numpy's, torch's on the CPU and on every GPU.

    They are made of tensors, numbers and strings, which ``torch.load(weights_only=True)`` reads.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (transforms draw from the global generator)
    return dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_random_states(states: dict[str, Any]) -> None:
    """Set the states of :func:`get_random_states`. Tensors may be on any device, as a checkpoint was loaded to it."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])  # noqa: NPY002
    torch.set_rng_state(states['torch'].cpu())
    if states['cuda']:
        torch.cuda.set_rng_state_all([state.cpu() for state in states['cuda']])


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Make a resumed run end with the weights of an undisturbed one. ::

        default_hooks = dict(random_state=dict(type='overlock_mm.RandomStateHook'))

    mmengine's Runner saves no random states. This hook

    - saves those of every process in each checkpoint, and sets them when the run is resumed,
    - sets them after a validation to what they were before: a run that was killed in it does not repeat it,
    - starts the workers of the data loader anew in each epoch, with seeds of that epoch: their states are not saved,
    - builds the data loader again if the run had no seed in its config: mmengine builds it before it reads the seed of the
      checkpoint,
    - writes a checkpoint under another name and renames it then: a kill leaves no file that is cut under the final name.

    A checkpoint without states, or with those of another number of processes, is resumed with a warning. docs/configs.md
    says what cannot be exact.
    """

    # At the start of an epoch, states are set before other hooks draw random numbers.
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._seed: Optional[int] = None  # the data loader was built with it
        self._loaded: Optional[list[dict[str, Any]]] = None  # of all processes
        self._to_set: Optional[dict[str, Any]] = None
        self._before_val: Optional[dict[str, Any]] = None
        self._to_save: Optional[list[dict[str, Any]]] = None  # of all processes

    # ------------------------------------------------------------------------------------------------------------ saving

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1:
                runner.logger.warning(
                    'CheckpointHook with max_keep_ckpts=1 removes the last checkpoint before it writes the next one, so '
                    'a kill in between loses both: set max_keep_ckpts=2'
                )
        runner.save_checkpoint = functools.partial(self._save_checkpoint, runner)
        self._before_val = None
        self._continue(runner)

    def _save_checkpoint(self, runner: Runner, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Runner.save_checkpoint in a run. Every process calls it, and the first one writes the file."""
        self._to_save = all_gather_object(self._before_val or get_random_states())
        save = functools.partial(type(runner).save_checkpoint, runner, out_dir)
        if not isinstance(get_file_backend(out_dir, backend_args=kwargs.get('backend_args')), LocalBackend):
            save(filename, *args, **kwargs)
            return
        part = f'{filename}.part'
        save(part, *args, **kwargs)
        if is_main_process():
            os.replace(os.path.join(out_dir, part), os.path.join(out_dir, filename))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._to_save is not None:
            checkpoint[KEY], self._to_save = self._to_save, None

    def before_val(self, runner: Runner) -> None:
        self._before_val = get_random_states()

    def after_val(self, runner: Runner) -> None:
        set_random_states(self._before_val)
        self._before_val = None

    # ---------------------------------------------------------------------------------------------------------- resuming

    def before_run(self, runner: Runner) -> None:
        self._seed = runner.seed

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._loaded = checkpoint.get(KEY, [])

    def _continue(self, runner: Runner) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None or runner.iter == 0:
            return  # nothing was loaded, or weights only
        loop = runner.train_loop
        if not isinstance(loop, IterBasedTrainLoop) and runner.iter % len(loop.dataloader):
            runner.logger.warning('The checkpoint was saved in the middle of an epoch. mmengine begins this epoch again.')
        self._to_set = _own_states(runner, loaded)
        if runner.seed != self._seed:
            diff_rank_seed = runner._randomness_cfg.get('diff_rank_seed', False)
            loop.dataloader = runner.build_dataloader(runner._train_dataloader, runner.seed, diff_rank_seed)
            if isinstance(loop, IterBasedTrainLoop):
                loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        states, self._to_set = self._to_set, None
        if isinstance(loop, IterBasedTrainLoop):
            if states is not None:
                loop.dataloader_iterator = _continued(loop.dataloader_iterator, loop.iter, states)
            return
        _restart_workers(loop.dataloader, runner)
        if states is not None:
            set_random_states(states)


def _own_states(runner: Runner, loaded: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """States of this process among those in a checkpoint, None if they do not fit. Then the user is warned."""
    consequence = 'so the resumed run differs from an undisturbed one'
    if not loaded:
        runner.logger.warning(f'The checkpoint has no random states (RandomStateHook was not in its run), {consequence}.')
        return None
    if len(loaded) != get_world_size():
        runner.logger.warning(
            f'The checkpoint has random states of {len(loaded)} processes, but this run has {get_world_size()}. They are '
            f'not set, {consequence}.'
        )
        return None
    states = loaded[get_rank()]
    gpus = torch.cuda.device_count()
    if len(states['cuda']) != gpus:
        runner.logger.warning(
            f'The checkpoint has random states of {len(states["cuda"])} GPUs, but this process has {gpus}. They are not '
            f'set, {consequence}.'
        )
        states = {**states, 'cuda': []}
    return states


def _restart_workers(loader: DataLoader, runner: Runner) -> None:
    """Let the next epoch begin with new workers, and with new seeds if mmengine seeds them."""
    loader._iterator = None  # where persistent workers live
    init = loader.worker_init_fn
    if isinstance(init, functools.partial) and init.func is worker_init_fn:
        init.keywords['seed'] = runner.seed + runner.epoch * loader.num_workers * get_world_size()


def _continued(batches: Iterator, skipped: int, states: dict[str, Any]) -> Iterator:
    """Batches of an iteration-based loop. After the skipped ones, which reading changes random states, states are set."""
    for _ in range(skipped):
        yield next(batches)
    set_random_states(states)
    yield from batches
