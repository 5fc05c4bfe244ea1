"""The state of autocast, for which torch < 2.4 has a function per device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ._modes import unseen_by_modes

if hasattr(torch, 'get_autocast_dtype'):

    def is_autocast_enabled(device_type: str) -> bool:
        return torch.is_autocast_enabled(device_type)

    def autocast_dtype(device_type: str) -> torch.dtype:
        return torch.get_autocast_dtype(device_type)
else:

    def is_autocast_enabled(device_type: str) -> bool:
        return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()

    def autocast_dtype(device_type: str) -> torch.dtype:
        return torch.get_autocast_cpu_dtype() if device_type == 'cpu' else torch.get_autocast_gpu_dtype()


def cast_as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast casts it to where it is enabled. As in torch, float64 stays float64."""
    with unseen_by_modes():
        dtype = dtype_under_autocast(x)
        unchanged = dtype == x.dtype  # to() would take longer to compare them
    return x if unchanged else x.to(dtype)


def dtype_under_autocast(x: Tensor) -> torch.dtype:
    dtype = x.dtype
    if dtype != torch.float64:
        device_type = x.device.type
        # The meta device has no autocast.
        if device_type != 'meta' and is_autocast_enabled(device_type):
            return autocast_dtype(device_type)
    return dtype


def autocast_disabled(device_type: str) -> contextlib.AbstractContextManager:
    """Context without autocast."""
    # The meta device has no autocast. A context takes longer than the question.
    enabled = device_type != 'meta' and is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()
