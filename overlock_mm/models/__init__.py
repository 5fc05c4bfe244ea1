"""The OverLoCK network, and its ContMix as a block for others."""

from ..registry import MODELS
from .contmix_block import ContMixBlock
from .overlock import OverLoCK

__all__ = ['ContMixBlock', 'OverLoCK', 'OverLoCKHead']


def __getattr__(name: str):
    if name == 'OverLoCKHead':
        from .heads import OverLoCKHead

        return OverLoCKHead
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


@MODELS.register_module(name='OverLoCKHead')
def _build_head(**kwargs):
    """Builds the head; registered in its place so that only those who ask for it need (and import) mmpretrain."""
    from .heads import OverLoCKHead

    return OverLoCKHead(**kwargs)
