"""Which kernels run on GPUs, where there are two: those of this package, or PyTorch's.

At the first call of a kind (operator, dtype, layout, kernel size, channels, and maps of about one size) both run a few
times, and the faster one runs from then on, as with ``torch.backends.cudnn.benchmark``. Nothing is measured under
``torch.use_deterministic_algorithms`` or in the capture of a CUDA graph: PyTorch's kernels run then, unless the kind was
measured before.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from . import _library

#: What :func:`set_cuda_kernels` takes.
SETTINGS = ('measured', 'ours', 'pytorch')

#: The setting at import.
ENVIRONMENT_VARIABLE = 'OVERLOCK_MM_CUDA_KERNELS'


class Choice(NamedTuple):
    """A choice that was measured.

    Args:
        kind: of calls.
        chosen: 'ours' or 'pytorch'.
        ours, pytorch: the shortest time of each, in milliseconds.
    """

    kind: str
    chosen: str
    ours: float
    pytorch: float


def has_cuda_kernels() -> bool:
    """Whether the binary was built with CUDA."""
    return bool(_library.build_info.get('cuda'))


def set_cuda_kernels(which: str) -> None:
    """Set which kernels run on GPUs, for the whole process: 'measured' (the default), 'ours' or 'pytorch'.

    The environment variable ``OVERLOCK_MM_CUDA_KERNELS`` sets it for scripts.

    Raises:
        ValueError: there is no such setting.
        RuntimeError: 'ours', and the binary was built without CUDA.
    """
    if which not in SETTINGS:
        raise ValueError(f'which must be one of {SETTINGS}, got {which!r}')
    if has_cuda_kernels():
        torch.ops.overlock_mm._set_cuda_kernels(which)
    elif which == 'ours':
        raise RuntimeError('there are no CUDA kernels: overlock_mm was built without CUDA. `python -m overlock_mm.ops`')


def cuda_choices() -> list[Choice]:
    """The choices that were measured in this process."""
    if not has_cuda_kernels():
        return []
    lines = (line.split('\t') for line in torch.ops.overlock_mm._cuda_choices().splitlines())
    return [Choice(kind, chosen, float(ours), float(pytorch)) for kind, chosen, ours, pytorch in lines]


def _set_from_environment() -> None:
    which = os.environ.get(ENVIRONMENT_VARIABLE)
    if which:
        if which not in SETTINGS:
            raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {SETTINGS}, got {which!r}')
        set_cuda_kernels(which)


_set_from_environment()
