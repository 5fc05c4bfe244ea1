"""Operators of OverLoCK."""

from . import _extension
from ._reference import contmix_reference
from .contmix import contmix

__all__ = ['contmix', 'contmix_reference']

_extension.announce_on_import()
