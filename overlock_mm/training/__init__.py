"""Training: models whose layers run in fewer passes over their maps."""

from .fuse import fuse, unfuse
from .hook import FuseForTrainingHook

__all__ = ['FuseForTrainingHook', 'fuse', 'unfuse']
