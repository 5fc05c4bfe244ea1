"""Finds and loads the compiled operator, and says so where there is none."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Optional

import torch

from ..versions import version_numbers

_BUILD_COMMAND = 'pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .'

try:
    from torch.compiler import is_compiling
except ImportError:  # torch < 2.3
    from torch._dynamo import is_compiling


def _load() -> tuple[Optional[str], dict[str, Any]]:
    """Register the compiled operators with torch; what went wrong, if they are not there, and what they were built for."""
    binaries = sorted(Path(__file__).parent.glob('_C*.so'))
    if not binaries:
        return 'overlock_mm was installed without its compiled operator', {}
    try:
        torch.ops.load_library(binaries[0])
        info = json.loads(torch.ops.overlock_mm._build_info())
    except (OSError, RuntimeError) as error:
        return f'the compiled operator does not load with torch {torch.__version__}: {error}', {}
    if version_numbers(info['torch'])[:2] != version_numbers(torch.__version__)[:2]:
        # It may load, and then read structures of another layout.
        return f'the compiled operator was built for torch {info["torch"]}, this is torch {torch.__version__}', {}
    return None, info


#: Why the compiled operator is missing (None where it is there), and what the binary was built for: ``torch``,
#: ``compiler``, ``cpu`` (the instruction set used here), ``cuda`` and ``cuda_architectures`` (None: for the CPU alone).
missing, build_info = _load()


def compiled_for(device: torch.device) -> bool:
    """Whether there is a compiled operator for tensors on ``device``. If not, say so, once for each kind of device."""
    if not missing and (device.type in ('cpu', 'meta') or (device.type == 'cuda' and build_info['cuda'] is not None)):
        return True
    # torch.compile cannot trace a warning; the usual reasons have been given on import.
    if not is_compiling():
        _announce_fallback(device.type)
    return False


def is_exporting() -> bool:
    """Whether a graph is being made for elsewhere, where there may be no compiled operator: ONNX, torch.export, a trace."""
    if torch.jit.is_tracing():
        return True
    # torch >= 2.7. Not is_exporting(): for torch.compile that is True in all it traces, not in exports alone.
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.onnx.is_in_onnx_export() if flag is None else flag


def announce_on_import() -> None:
    """Say at once what will be slow: everything, without a binary; the GPU of this machine, without CUDA in it."""
    if missing:
        _announce_fallback('cpu')
    elif build_info['cuda'] is None and torch.cuda.device_count():
        _announce_fallback('cuda')


@cache
def _announce_fallback(device_type: str) -> None:
    reason = missing
    if not reason and device_type == 'cuda':
        reason = 'overlock_mm was built without CUDA, but there is a GPU'
    elif not reason:
        reason = f'there is no compiled operator for the device {device_type!r}'
    force = 'FORCE_CUDA=1 ' if device_type == 'cuda' else ''
    warnings.warn(
        f'{reason}: ContMix runs through its reference in plain PyTorch, several times slower and with many times the '
        "memory, and so do, on the CPU, the static convolutions and norms. To build it, in overlock_mm's sources, with a "
        f'C++ compiler (and a CUDA toolkit that fits torch, for a GPU):\n    {force}{_BUILD_COMMAND}',
        RuntimeWarning,
        stacklevel=4,
    )
