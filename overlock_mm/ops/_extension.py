"""Finds and loads the compiled operator, and says so where there is none."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Optional

import torch

_BUILD_COMMAND = 'pip install --no-build-isolation --force-reinstall --no-deps overlock_mm'


def _load() -> Optional[str]:
    """Register the compiled operators with torch; what went wrong, if they are not there."""
    binaries = sorted(Path(__file__).parent.glob('_C*.so'))
    if not binaries:
        return 'overlock_mm was installed without its compiled operator'
    try:
        torch.ops.load_library(binaries[0])
    except (OSError, RuntimeError) as error:
        return (
            f'the compiled operator does not load with torch {torch.__version__} (it serves the version of torch that '
            f'it was built with): {error}'
        )
    return None


#: Why the compiled operator is missing; None where it is there.
missing: Optional[str] = _load()

#: What the binary was built for: ``torch``, ``compiler``, ``cpu`` (the instruction set used here), ``cuda`` and
#: ``cuda_architectures``, which are None for a binary of the CPU alone. Empty where there is no binary.
build_info: dict[str, Any] = {} if missing else json.loads(torch.ops.overlock_mm._build_info())


def compiled_for(device: torch.device) -> bool:
    """Whether there is a compiled operator for tensors on ``device``. If not, say so, once for each kind of device."""
    if not missing and (device.type in ('cpu', 'meta') or (device.type == 'cuda' and build_info['cuda'] is not None)):
        return True
    # torch.compile cannot trace a warning; the usual reasons have been given on import.
    if not torch.compiler.is_compiling():
        _announce_fallback(device.type)
    return False


def announce_on_import() -> None:
    """Say at once what will be slow: everything, without a binary; the GPU of this machine, without CUDA in it."""
    if missing:
        _announce_fallback('cpu')
    elif torch.cuda.is_available() and build_info['cuda'] is None:
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
        f'memory. To build it, with torch installed (and a CUDA toolkit, for a GPU):\n    {force}{_BUILD_COMMAND}',
        RuntimeWarning,
        stacklevel=4,
    )
