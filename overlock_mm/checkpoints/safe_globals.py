"""Reading mmengine's checkpoints with torch's weights-only loading, the default since torch 2.6."""

from __future__ import annotations

import re

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from ..versions import version_numbers

#: Functions that mmengine's objects refer to, by the class that has them.
_FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'mean', 'current'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
#: One type of each kind that holds no objects: bools, integers, floats, complex numbers, bytes and strings.
_DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8', 'c8', 'c16', 'S1', 'U1')


class _Array(np.ndarray):
    """Replacement for ndarray while a checkpoint is read. It takes a saved state, but cannot be called.

    Calling ndarray itself would be unsafe: with a buffer and an object dtype it reads bytes as addresses of objects.
    """

    def __new__(cls, *args, **kwargs):
        raise ValueError('a checkpoint must not call numpy.ndarray')

    def __setstate__(self, state):
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _rebuilt(dtype), is_fortran, data))

    def __reduce_ex__(self, protocol):
        # Saved again as a plain array.
        return np.asarray(self).__reduce_ex__(protocol)


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    if not isinstance(code, str) or not (code in _DTYPES or re.fullmatch(r'[SU]\d+', code)):
        raise ValueError(f'numpy.dtype in a checkpoint must be of numbers or strings, got {code!r}')
    return np.dtype(code, align=align, copy=copy)


def _reconstruct(subtype: type, shape: tuple, code: bytes) -> _Array:
    if subtype is not _Array or shape != (0,) or code not in (b'b', 'b'):
        raise ValueError(f'a checkpoint may reconstruct numpy arrays only, got {subtype!r} of shape {shape!r}')
    return np.ndarray.__new__(_Array, shape, code)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, _rebuilt(dtype), count=1)[0]


def _rebuilt(dtype: np.dtype) -> np.dtype:
    """Return a dtype of the same type, size and byte order. The rest of the state in a checkpoint could be anything."""
    return _dtype(dtype.str[1:]).newbyteorder(dtype.str[0])


def _function(owner: type, name: str):
    """Replacement for ``getattr`` while a checkpoint is read. It returns the functions of mmengine's objects only."""
    if name not in _FUNCTIONS.get(owner, ()):
        raise ValueError(f'a checkpoint may refer to functions of its own objects only, got {name!r} of {owner!r}')
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read everything that mmengine's Runner saves beside the weights.

    The message hub has HistoryBuffer objects, which hold numpy arrays and refer to their own methods through ``getattr``.
    The one-cycle scheduler refers to its own functions in the same way. The metadata of a data set can have ConfigDicts,
    and arrays of numbers and of strings. mmengine 0.10 cannot resume or test from such a file with torch >= 2.6.

    The objects allowed here can only create numbers, strings, arrays of them, and dicts. torch still refuses a checkpoint
    with any other object, and its error names the object. With torch < 2.6 this function does nothing, because loading is
    unrestricted by default.
    """
    if version_numbers(torch.__version__) < (2, 6):
        return
    allowed = [
        bytes,
        ConfigDict,
        *_FUNCTIONS,
        (_Array, 'numpy.ndarray'),
        (_dtype, 'numpy.dtype'),
        (_function, 'builtins.getattr'),
        *{type(np.dtype(code)) for code in _DTYPES},
    ]
    for core in ('numpy.core', 'numpy._core'):  # of numpy 1 and numpy 2
        allowed += [(_reconstruct, f'{core}.multiarray._reconstruct'), (_scalar, f'{core}.multiarray.scalar')]
    torch.serialization.add_safe_globals(allowed)
    # For each load, onedl-mmengine registers other objects under the same names and removes both afterwards. torch picks
    # one of the two at random. The fork then loads a refused file without restriction. torch.load replaces this mechanism.
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = torch.load
