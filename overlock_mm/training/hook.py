"""Fused models in the frameworks' training scripts."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from .fuse import FusedSequential, fuse


@HOOKS.register_module()
class FuseForTrainingHook(Hook):
    """Train the model with fused layers (:func:`overlock_mm.training.fuse`).

    Checkpoints have the same names, and other hooks see the same modules. ::

        custom_hooks = [dict(type='overlock_mm.FuseForTrainingHook')]
    """

    def before_train(self, runner: Runner) -> None:
        fuse(runner.model)
        if not any(isinstance(module, FusedSequential) for module in runner.model.modules()):
            runner.logger.warning('FuseForTrainingHook has no effect: no layers of the model can be fused')
