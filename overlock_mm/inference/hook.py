"""Optimized copies around validation and test, in the frameworks' scripts."""

from __future__ import annotations

from typing import Any, Optional

import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from .optimize import optimize


@HOOKS.register_module()
class OptimizeForInferenceHook(Hook):
    """Validate and test with an optimized copy of the model, and go on with the model itself.

    Scores are the same to rounding (see :func:`overlock_mm.inference.optimize`). While the copy lives, it takes the memory
    of the weights again. ::

        custom_hooks = [dict(type='overlock_mm.OptimizeForInferenceHook')]
    """

    # After hooks that put other weights into the model (EMAHook is NORMAL), and before those that save it (VERY_LOW).
    priority = 'LOW'

    def __init__(self) -> None:
        self._model: Optional[nn.Module] = None

    def before_val_epoch(self, runner: Runner) -> None:
        self._model, runner.model = runner.model, optimize(runner.model)

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        runner.model, self._model = self._model, None

    def before_test_epoch(self, runner: Runner) -> None:
        self.before_val_epoch(runner)

    def after_test_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self.after_val_epoch(runner)
