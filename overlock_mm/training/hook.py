"""Fused models in the frameworks' training scripts."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from .fuse import fuse


@HOOKS.register_module()
class FuseForTrainingHook(Hook):
    """Train the model with fused layers (:func:`overlock_mm.training.fuse`).

    Checkpoints have the same names, and other hooks see the same modules. ::

        custom_hooks = [dict(type='overlock_mm.FuseForTrainingHook')]
    """

    def before_train(self, runner: Runner) -> None:
        before = [type(module) for module in runner.model.modules()]
        if [type(module) for module in fuse(runner.model).modules()] == before:
            runner.logger.warning('FuseForTrainingHook has no effect: the model has no layers that can be fused')
