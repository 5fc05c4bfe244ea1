"""Shared by the tests of configs: loading, building, optimizer settings and schedules."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.optim.optimizer import default_constructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from mmengine.registry.utils import init_default_scope

import overlock_mm
from overlock_mm.models.overlock import STAGES


def load(name: str) -> Config:
    """Load a shipped config and make its framework the default scope."""
    cfg = Config.fromfile(overlock_mm.get_config_path(name))
    init_default_scope(cfg.default_scope)
    return cfg


def build(cfg: Config, device: str = 'cpu') -> torch.nn.Module:
    """Build the model of a config without pre-trained weights. On 'meta' it needs no memory."""
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with torch.device(device):
        return MODELS.build(model)


def parameter_settings(model: torch.nn.Module, cfg: Config) -> dict[str, dict]:
    """Return the settings (lr, weight_decay, ...) of the config's optimizer for each parameter, by name.

    The config's constructor creates the groups. No optimizer is built from them: torch compares each group with all others,
    which takes seconds for a large network.
    """
    settings = cfg.optim_wrapper.to_dict()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=settings.pop('constructor', 'DefaultOptimWrapperConstructor'),
            paramwise_cfg=settings.pop('paramwise_cfg', None),
            optim_wrapper_cfg=settings,
        )
    )
    groups = []
    with mock.patch.object(default_constructor, 'print_log'):  # it logs a line for every parameter
        constructor.add_params(groups, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        (parameter,) = group.pop('params')
        found[names[id(parameter)]] = {**settings['optimizer'], **group}
    return found


def blocks_without(backbone: torch.nn.Module, names: set[str]) -> list[str]:
    """Return the blocks of the backbone without any parameter among the names. The names are those of the whole model."""
    blocks = [f'backbone.{stage}.{i}.' for stage in STAGES for i in range(len(getattr(backbone, stage)))]
    return [block for block in blocks if not any(name.startswith(block) for name in names)]


def learning_rates(cfg: Config, iterations: int, iterations_per_epoch: int = 0) -> list[float]:
    """Return the learning rate at every iteration, with the steps of mmengine's ParamSchedulerHook."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(
            dict(scheduler), default_args=dict(optimizer=optimizer, epoch_length=iterations_per_epoch or None)
        )
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for iteration in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        ends_epoch = iterations_per_epoch and (iteration + 1) % iterations_per_epoch == 0
        for scheduler in schedulers:
            if not scheduler.by_epoch or ends_epoch:
                scheduler.step()
    return rates


def flat(value, prefix='') -> set[tuple[str, str]]:
    """Return the settings of a nested dict as pairs of a dotted name and a value."""
    if isinstance(value, dict):
        return {item for key, inner in value.items() for item in flat(inner, f'{prefix}{key}.')}
    return {(prefix.rstrip('.'), repr(value))}
