"""Operators of OverLoCK."""

from ._reference import contmix_reference
from .contmix import contmix

__all__ = ['contmix', 'contmix_reference']
