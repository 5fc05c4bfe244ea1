"""Training: what makes steps of a model faster, without changing what it computes."""

from .fuse import fuse, unfuse
from .hook import FuseForTrainingHook

__all__ = ['FuseForTrainingHook', 'fuse', 'unfuse']
