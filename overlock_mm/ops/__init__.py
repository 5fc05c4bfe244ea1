"""Operators of OverLoCK."""

from . import _library
from ._library import use_references
from ._reference import contmix_reference
from .contmix import contmix, contmix_kernels
from .conv2d import conv2d
from .depthwise import depthwise_conv2d, residual_depthwise_conv2d
from .elementwise import gelu
from .norms import branch_norms, global_response_norm, residual_depthwise_norm

__all__ = [
    'branch_norms',
    'contmix',
    'contmix_kernels',
    'contmix_reference',
    'conv2d',
    'depthwise_conv2d',
    'gelu',
    'global_response_norm',
    'residual_depthwise_conv2d',
    'residual_depthwise_norm',
    'use_references',
]

_library.announce_on_import()
