"""Training: what makes steps of a model faster, without changing what it computes."""

from .norms import convert_sync_norms, restore_sync_norms

__all__ = ['convert_sync_norms', 'restore_sync_norms']
