"""mmengine's own checkpoints under torch's weights-only loading (the default from torch 2.6 on)."""

from __future__ import annotations

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..versions import version_numbers

_STATISTICS = ('min', 'max', 'mean', 'current')
_NUMBERS = ('?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


class _Array(np.ndarray):
    """Stands in for ndarray in a checkpoint: it is filled from its saved state, and cannot be called.

    ndarray itself can be called with a buffer and an object dtype, and then takes bytes for addresses of objects.
    """

    def __new__(cls, *args, **kwargs):
        raise ValueError('refused to call numpy.ndarray from a checkpoint')

    def __reduce__(self):
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol):
        # Saved as the plain array it is, not as this class.
        return np.asarray(self).__reduce_ex__(protocol)


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    if code not in _NUMBERS:
        raise ValueError(f'refused to make numpy.dtype({code!r}) from a checkpoint: only numbers are allowed')
    return np.dtype(code, align=align, copy=copy)


def _reconstruct(subtype: type, shape: tuple, code: bytes) -> _Array:
    if subtype is not _Array or shape != (0,) or code not in (b'b', 'b'):
        raise ValueError(f'refused to reconstruct {subtype!r} of shape {shape!r} from a checkpoint')
    return np.ndarray.__new__(_Array, shape, code)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    # A dtype here can only be one of _NUMBERS: see _dtype.
    return np.frombuffer(data, dtype, count=1)[0]


def _history_buffer_statistic(owner: type, name: str):
    """Stands in for ``getattr`` in a checkpoint, and answers for HistoryBuffer's own statistics only."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(
            f"refused to read {name!r} of {owner!r}: a checkpoint may only refer to HistoryBuffer's statistics"
        )
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read what mmengine's Runner saves beside the weights, and nothing else.

    With the weights the Runner saves its message hub: HistoryBuffer objects, which hold numpy arrays and refer to their
    own methods through ``getattr``. mmengine 0.10 cannot resume or test from such a file under torch >= 2.6. What is
    allowed here makes numbers and arrays of numbers only; a checkpoint with any other object is still refused, by torch,
    with an error that names the object. torch < 2.6 loads without restriction by default, and needs nothing.
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
    for core in ('numpy.core', 'numpy._core'):  # as numpy 1 and numpy 2 write it
        allowed += [(_reconstruct, f'{core}.multiarray._reconstruct'), (_scalar, f'{core}.multiarray.scalar')]
    torch.serialization.add_safe_globals(allowed)
    # onedl-mmengine has a solution of its own: for each load it registers other objects under the same names, of which
    # torch takes either, at random, and takes these away with its own afterwards; and it loads without restriction what
    # is refused. With the above, torch's own loading does.
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = torch.load
