"""Inference: trained models as folded copies that run faster."""

from .hook import OptimizeForInferenceHook
from .optimize import optimize

__all__ = ['OptimizeForInferenceHook', 'optimize']
