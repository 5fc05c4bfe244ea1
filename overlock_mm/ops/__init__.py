"""Operators of OverLoCK."""

from . import _library, flops
from ._library import keep_operators, use_references
from ._reference import contmix_reference
from .contmix import contmix, contmix_kernels
from .conv2d import conv2d
from .cuda_kernels import cuda_choices, set_cuda_kernels
from .depthwise import depthwise_conv2d, residual_depthwise_conv2d
from .elementwise import gelu
from .norms import (
    branch_norms,
    branch_norms_given,
    gelu_residual_depthwise_norm,
    global_response_norm,
    layer_norm,
    residual_depthwise_norm,
)
from .sync_norms import sync_branch_norms

__all__ = [
    'branch_norms',
    'branch_norms_given',
    'contmix',
    'contmix_kernels',
    'contmix_reference',
    'conv2d',
    'cuda_choices',
    'depthwise_conv2d',
    'gelu',
    'gelu_residual_depthwise_norm',
    'global_response_norm',
    'keep_operators',
    'layer_norm',
    'residual_depthwise_conv2d',
    'residual_depthwise_norm',
    'set_cuda_kernels',
    'sync_branch_norms',
    'use_references',
]

_library.announce_on_import()
flops.register()
