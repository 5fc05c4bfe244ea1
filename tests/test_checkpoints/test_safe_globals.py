"""mmengine's own checkpoints load under weights-only loading; anything else in one is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from overlock_mm.checkpoints import safe_globals

weights_only_is_default = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6), reason='torch < 2.6 loads without restriction by default'
)


RECONSTRUCT = np.zeros(1).__reduce__()[0]


class Foreign:
    pass


@weights_only_is_default
def test_a_message_hub_loads(tmp_path):
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
def test_anything_else_is_refused(tmp_path):
    torch.save(dict(state_dict={}, extra=Foreign()), tmp_path / 'foreign.pth')
    with pytest.raises(pickle.UnpicklingError, match=r'Foreign'):
        torch.load(tmp_path / 'foreign.pth')


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@weights_only_is_default
def test_what_was_loaded_can_be_saved_and_loaded_again(tmp_path):
    """As a resumed run does it."""
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
        (Calls(getattr, HistoryBuffer, '__init__'), 'refused to read .*__init__'),
        (Calls(getattr, HistoryBuffer, 'register_statistics'), 'refused to read .*register_statistics'),
        (Calls(getattr, np.ndarray, 'tofile'), 'refused to read .*tofile'),
        # Bytes taken for the address of an object.
        (Calls(np.ndarray, (1,), 'O', b'12345678'), 'refused to call numpy.ndarray'),
        (Calls(np.dtype, 'O'), r"refused to make numpy.dtype\('O'\)"),
        (Calls(np.dtype, 'V8'), 'refused to make numpy.dtype'),
        (Calls(RECONSTRUCT, HistoryBuffer, (0,), b'b'), 'refused to reconstruct .*HistoryBuffer'),
        (Calls(RECONSTRUCT, np.ndarray, (10**12,), b'b'), 'refused to reconstruct'),
    ],
)
def test_what_is_allowed_makes_numbers_only(tmp_path, call, message):
    torch.save(dict(extra=call), tmp_path / 'call.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=message):
        torch.load(tmp_path / 'call.pth')


def test_the_stand_in_answers_for_statistics_only():
    assert safe_globals._history_buffer_statistic(HistoryBuffer, 'min') is HistoryBuffer.min
    with pytest.raises(ValueError, match="refused to read '__globals__'"):
        safe_globals._history_buffer_statistic(HistoryBuffer.min, '__globals__')
