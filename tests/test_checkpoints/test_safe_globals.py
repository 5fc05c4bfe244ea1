"""Weights-only loading reads mmengine's own checkpoints and refuses other objects in them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from overlock_mm.checkpoints import safe_globals

weights_only_is_default = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6), reason='torch < 2.6 loads any object by default'
)


RECONSTRUCT = np.zeros(1).__reduce__()[0]


class Foreign:
    pass


@weights_only_is_default
def test_message_hub_loads(tmp_path):
    history = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        history.update(value)
    hub = dict(log_scalars={'train/loss': history}, runtime_info=dict(lr=np.float64(0.1), seed=np.int64(3)))
    torch.save(dict(state_dict=dict(weight=torch.ones(2)), message_hub=hub), tmp_path / 'epoch_1.pth')
    loaded = torch.load(tmp_path / 'epoch_1.pth')
    restored = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(restored, HistoryBuffer)
    assert (restored.min(), restored.max(), restored.mean(), restored.current()) == (1.0, 3.0, 2.0, 2.0)
    assert loaded['message_hub']['runtime_info'] == dict(lr=0.1, seed=3)


@weights_only_is_default
def test_other_objects_are_refused(tmp_path):
    torch.save(dict(state_dict={}, extra=Foreign()), tmp_path / 'foreign.pth')
    with pytest.raises(pickle.UnpicklingError, match=r'Foreign'):
        torch.load(tmp_path / 'foreign.pth')


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@weights_only_is_default
def test_loaded_history_is_saved_and_loaded_again(tmp_path):
    """A resumed run does this."""
    history = HistoryBuffer()
    for _ in range(2):
        history.update(1.5)
        torch.save(dict(history=history), tmp_path / 'hub.pth')
        history = torch.load(tmp_path / 'hub.pth')['history']
    assert history.mean() == 1.5
    assert len(history.data[0]) == 2


@weights_only_is_default
@pytest.mark.parametrize(
    'call, message',
    [
        (Calls(getattr, HistoryBuffer, '__init__'), "HistoryBuffer's statistics only, got '__init__'"),
        (
            Calls(getattr, HistoryBuffer, 'register_statistics'),
            "HistoryBuffer's statistics only, got 'register_statistics'",
        ),
        (Calls(getattr, np.ndarray, 'tofile'), "HistoryBuffer's statistics only, got 'tofile'"),
        # It would read bytes as the address of an object.
        (Calls(np.ndarray, (1,), 'O', b'12345678'), 'must not call numpy.ndarray'),
        (Calls(np.dtype, 'O'), "numpy.dtype in a checkpoint must be a number type, got 'O'"),
        (Calls(np.dtype, 'V8'), "numpy.dtype in a checkpoint must be a number type, got 'V8'"),
        (Calls(RECONSTRUCT, HistoryBuffer, (0,), b'b'), 'may reconstruct numpy arrays only, got .*HistoryBuffer'),
        (Calls(RECONSTRUCT, np.ndarray, (10**12,), b'b'), 'may reconstruct numpy arrays only'),
    ],
)
def test_allowed_objects_create_numbers_only(tmp_path, call, message):
    torch.save(dict(extra=call), tmp_path / 'call.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=message):
        torch.load(tmp_path / 'call.pth')


def test_getattr_returns_statistics_only():
    assert safe_globals._history_buffer_statistic(HistoryBuffer, 'min') is HistoryBuffer.min
    with pytest.raises(ValueError, match="got '__globals__'"):
        safe_globals._history_buffer_statistic(HistoryBuffer.min, '__globals__')
