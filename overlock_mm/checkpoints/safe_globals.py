"""Reading mmengine's checkpoints with torch's weights-only loading, the default since torch 2.6."""

from __future__ import annotations

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..versions import version_numbers

_STATISTICS = ('min', 'max', 'mean', 'current')
_NUMBERS = ('?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


class _Array(np.ndarray):
    """Replacement for ndarray while a checkpoint is read. It takes a saved state, but cannot be called.

    Calling ndarray itself would be unsafe: with a buffer and an object dtype it reads bytes as addresses of objects.
    """

    def __new__(cls, *args, **kwargs):
        raise ValueError('a checkpoint must not call numpy.ndarray')

    def __reduce_ex__(self, protocol):
        # Saved again as a plain array.
        return np.asarray(self).__reduce_ex__(protocol)


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    if code not in _NUMBERS:
        raise ValueError(f'numpy.dtype in a checkpoint must be a number type, got {code!r}')
    return np.dtype(code, align=align, copy=copy)


def _reconstruct(subtype: type, shape: tuple, code: bytes) -> _Array:
    if subtype is not _Array or shape != (0,) or code not in (b'b', 'b'):
        raise ValueError(f'a checkpoint may reconstruct numpy arrays only, got {subtype!r} of shape {shape!r}')
    return np.ndarray.__new__(_Array, shape, code)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    # _dtype has allowed this dtype.
    return np.frombuffer(data, dtype, count=1)[0]


def _history_buffer_statistic(owner: type, name: str):
    """Replacement for ``getattr`` while a checkpoint is read. It returns statistics of HistoryBuffer only."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(f"a checkpoint may refer to HistoryBuffer's statistics only, got {name!r} of {owner!r}")
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read the message hub that mmengine's Runner saves beside the weights.

    The message hub has HistoryBuffer objects, which hold numpy arrays and refer to their own methods through ``getattr``.
    mmengine 0.10 cannot resume or test from such a file with torch >= 2.6. The objects allowed here can only create numbers
    and arrays of numbers. torch still refuses a checkpoint with any other object, and its error names the object. With
    torch < 2.6 this function does nothing, because loading is unrestricted by default.
    """
    if version_numbers(torch.__version__) < (2, 6):
        return
    allowed = [
        HistoryBuffer,
        (_Array, 'numpy.ndarray'),
        (_dtype, 'numpy.dtype'),
        (_history_buffer_statistic, 'builtins.getattr'),
        *{type(np.dtype(code)) for code in _NUMBERS},
    ]
    for core in ('numpy.core', 'numpy._core'):  # of numpy 1 and numpy 2
        allowed += [(_reconstruct, f'{core}.multiarray._reconstruct'), (_scalar, f'{core}.multiarray.scalar')]
    torch.serialization.add_safe_globals(allowed)
    # For each load, onedl-mmengine registers other objects under the same names and removes both afterwards. torch picks
    # one of the two at random. The fork then loads a refused file without restriction. torch.load replaces this mechanism.
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = torch.load
