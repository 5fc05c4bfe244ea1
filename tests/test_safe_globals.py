"""mmengine's own checkpoints load under weights-only loading; anything else in one is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import overlock_mm.safe_globals as safe_globals

weights_only_is_default = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6), reason='torch < 2.6 loads without restriction by default'
)


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


class ReadsAnAttribute:
    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


@weights_only_is_default
@pytest.mark.parametrize(
    'owner, name', [(HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'), (np.ndarray, 'tofile')]
)
def test_getattr_is_confined(tmp_path, owner, name):
    torch.save(dict(extra=ReadsAnAttribute(owner, name)), tmp_path / 'attribute.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=f'refused to read .*{name}'):
        torch.load(tmp_path / 'attribute.pth')


def test_the_stand_in_answers_for_statistics_only():
    assert safe_globals._history_buffer_statistic(HistoryBuffer, 'min') is HistoryBuffer.min
    with pytest.raises(ValueError, match="refused to read '__globals__'"):
        safe_globals._history_buffer_statistic(HistoryBuffer.min, '__globals__')
