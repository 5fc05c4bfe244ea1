"""Under which of PyTorch's modes a call runs."""

from __future__ import annotations

import contextlib

import torch

try:
    from torch.compiler import is_compiling
except ImportError:  # torch < 2.3
    from torch._dynamo import is_compiling  # noqa: F401


def is_exporting() -> bool:
    """Whether a graph is being made for elsewhere, where there may be no compiled operator: ONNX, torch.export, a trace."""
    if torch.jit.is_tracing():
        return True
    # torch >= 2.7. Not is_exporting(), which is True under torch.compile too.
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.onnx.is_in_onnx_export() if flag is None else flag


def unseen_by_modes() -> contextlib.AbstractContextManager:
    """Context for reading properties and making views, of which a torch-function mode would see every one.

    The mode that saves memory in training costs some microseconds for each call that it sees.
    """
    return contextlib.nullcontext() if is_compiling() else torch._C.DisableTorchFunction()
