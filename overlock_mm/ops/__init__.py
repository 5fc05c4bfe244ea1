"""Operators of OverLoCK."""

from . import _extension
from ._reference import contmix_reference
from .contmix import contmix
from .conv2d import conv2d
from .depthwise import (
    branch_norms,
    depthwise_conv2d,
    global_response_norm,
    has_depthwise,
    residual_depthwise_conv2d,
    residual_depthwise_norm,
)

__all__ = [
    'branch_norms',
    'contmix',
    'contmix_reference',
    'conv2d',
    'depthwise_conv2d',
    'global_response_norm',
    'has_depthwise',
    'residual_depthwise_conv2d',
    'residual_depthwise_norm',
]

_extension.announce_on_import()
