"""mmengine's own checkpoints under torch's weights-only loading (the default from torch 2.6 on)."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS = ('min', 'max', 'mean', 'current')


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
    own methods through ``getattr``. mmengine 0.10 cannot resume or test from such a file under torch >= 2.6. The globals
    allowed here build numbers and arrays only; a checkpoint with any other object is still refused by torch with an error
    that names the object.
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return  # torch < 2.4, which knows no such list; there and up to 2.5 mmengine loads without restriction
    core = np._core if hasattr(np, '_core') and np.__version__ >= '2' else np.core
    allowed = [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        (_history_buffer_statistic, 'builtins.getattr'),
        *{type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')},
    ]
    torch.serialization.add_safe_globals(allowed)
