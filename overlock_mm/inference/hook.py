"""Optimized copies around validation and test, in the frameworks' scripts."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from .optimize import optimize


@HOOKS.register_module()
class OptimizeForInferenceHook(Hook):
    """Validate and test with an optimized copy of the model, and go on with the model itself.

    Scores are the same to rounding (see :func:`overlock_mm.inference.optimize`). The copy takes the memory of the weights
    again, until the end of the loop. ::

        custom_hooks = [dict(type='overlock_mm.OptimizeForInferenceHook')]
    """

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._use_copy(runner.model, 'val_step', batch_idx)

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self._drop_copy(runner.model)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._use_copy(runner.model, 'test_step', batch_idx)

    def after_test_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self._drop_copy(runner.model)

    def _use_copy(self, model: nn.Module, step: str, batch_idx: int) -> None:
        """Let the model's step be the copy's. The model stays in its place, whatever becomes of the loop.

        Every pass over the data begins with a new copy: hooks may have put other weights into the model, as mmpretrain's
        EMAHook does for a second pass within one epoch.
        """
        if batch_idx == 0 or step not in vars(model):
            self._drop_copy(model)
            setattr(model, step, getattr(optimize(model), step))

    def _drop_copy(self, model: nn.Module) -> None:
        for step in ('val_step', 'test_step'):
            vars(model).pop(step, None)
