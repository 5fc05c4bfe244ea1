"""Weights-only loading reads mmengine's own checkpoints and refuses other objects in them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim.scheduler import OneCycleParamScheduler
from mmengine.registry import DATASETS, OPTIMIZERS, PARAM_SCHEDULERS, Registry
from mmengine.runner import Runner

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
        (Calls(getattr, HistoryBuffer, '__init__'), "functions of its own objects only, got '__init__'"),
        (
            Calls(getattr, HistoryBuffer, 'register_statistics'),
            "functions of its own objects only, got 'register_statistics'",
        ),
        (Calls(getattr, OneCycleParamScheduler, '__init__'), "functions of its own objects only, got '__init__'"),
        (Calls(getattr, np.ndarray, 'tofile'), "functions of its own objects only, got 'tofile'"),
        # It would read bytes as the address of an object.
        (Calls(np.ndarray, (1,), 'O', b'12345678'), 'must not call numpy.ndarray'),
        (Calls(np.dtype, 'O'), "numpy.dtype in a checkpoint must be of numbers or strings, got 'O'"),
        (Calls(np.dtype, 'V8'), "numpy.dtype in a checkpoint must be of numbers or strings, got 'V8'"),
        (Calls(RECONSTRUCT, HistoryBuffer, (0,), b'b'), 'may reconstruct numpy arrays only, got .*HistoryBuffer'),
        (Calls(RECONSTRUCT, np.ndarray, (10**12,), b'b'), 'may reconstruct numpy arrays only'),
    ],
)
def test_allowed_objects_create_data_only(tmp_path, call, message):
    torch.save(dict(extra=call), tmp_path / 'call.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=message):
        torch.load(tmp_path / 'call.pth')


def test_getattr_returns_the_listed_functions_only():
    assert safe_globals._function(HistoryBuffer, 'min') is HistoryBuffer.min
    with pytest.raises(ValueError, match="got '__globals__'"):
        safe_globals._function(HistoryBuffer.min, '__globals__')


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@weights_only_is_default
@pytest.mark.parametrize(
    'value',
    [
        list(np.unique(['a sign', 'a ball'])),
        np.array(['ab', '', 'c']),
        np.array([b'ab', b'c']),
        np.array([['a', 'b'], ['c', 'd']], order='F')[:, :1],
        np.array([True, False]),
        np.bool_(True),
        np.complex64(1 + 2j),
        np.arange(3, dtype='>i4'),
        np.zeros((0, 3)),
        ConfigDict(a=[ConfigDict(b=1)]),
    ],
    ids=lambda value: f'{type(value).__name__}-{getattr(value, "dtype", "")}',
)
def test_metadata_of_a_data_set(value):
    loaded = saved_and_loaded(dict(meta=dict(dataset_meta=dict(value=value))))['meta']['dataset_meta']['value']
    np.testing.assert_array_equal(loaded, value)
    if isinstance(value, np.ndarray):
        assert loaded.dtype == value.dtype.newbyteorder('=')
    else:
        assert type(loaded) is type(value)


class StringType:
    """Pickled as numpy pickles the type of strings, with another state."""

    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return np.dtype, ('U1', False, True), (3, '<', None, None, None, self.size, 4, 0)


@weights_only_is_default
@pytest.mark.parametrize('size', [-4, 10**9])
def test_string_of_another_size_than_its_data_is_refused(size):
    scalar = np.str_('a').__reduce__()[0]
    with pytest.raises((pickle.UnpicklingError, ValueError), match='must be of numbers or strings|buffer'):
        saved_and_loaded(Calls(scalar, StringType(size), b'abcd'))


def registered(registry: Registry) -> dict[str, type]:
    """All classes of a registry of mmengine's, with those of the installed frameworks."""
    for framework in ('mmdet', 'mmseg', 'mmpretrain'):
        if importlib.util.find_spec(framework) is not None:
            importlib.import_module(f'{framework}.utils').register_all_modules(init_default_scope=False)
    classes = dict(registry.module_dict)
    for scope, child in registry.children.items():
        classes.update({f'{scope}.{name}': cls for name, cls in child.module_dict.items()})
    return classes


SCHEDULERS = dict(
    Constant={},
    CosineAnnealing=dict(T_max=9),
    CosineRestart=dict(periods=[4, 5], restart_weights=[1.0, 0.5], eta_min=1e-3),
    Exponential=dict(gamma=0.9),
    Linear={},
    MultiStep=dict(milestones=[2]),
    OneCycle=dict(eta_max=0.2, total_steps=9),
    Poly={},
    QuadraticWarmup=dict(end=5),
    ReduceOnPlateau={},
    Step=dict(step_size=2),
)


@weights_only_is_default
def test_every_scheduler_is_resumed():
    for name, cls in registered(PARAM_SCHEDULERS).items():
        (settings,) = (SCHEDULERS[kind] for kind in SCHEDULERS if cls.__name__.startswith(kind))
        settings = {**settings, **(dict(param_name='lr') if name.endswith('ParamScheduler') else {})}
        values = []
        for stops_after in (None, 3):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=0.1)
            scheduler = cls(optimizer=optimizer, **settings)
            for step in range(8):
                if step == stops_after:
                    state, groups = saved_and_loaded([scheduler.state_dict(), optimizer.state_dict()])
                    optimizer.load_state_dict(groups)
                    scheduler.load_state_dict(state)
                optimizer.step()
                scheduler.step()
            values.append({key: value for key, value in optimizer.param_groups[0].items() if key != 'params'})
        assert values[0] == values[1], name


@weights_only_is_default
def test_every_optimizer_is_resumed():
    abstract = {'Optimizer', 'ZeroRedundancyOptimizer'}  # the latter needs processes
    for name, cls in registered(OPTIMIZERS).items():
        if name in abstract:
            continue
        accepted = inspect.signature(cls.__init__).parameters
        for settings in ({}, dict(fused=True)) if 'fused' in accepted else ({},):
            weight = torch.nn.Parameter(torch.ones(2, 2))
            optimizer = cls([weight], **settings, **(dict(lr=0.1) if 'lr' in accepted else {}))
            weight.grad = torch.ones(2, 2).to_sparse() if name == 'SparseAdam' else torch.ones(2, 2)
            optimizer.step(*([weight.sum] if name == 'LBFGS' else []))
            state = optimizer.state_dict()
            loaded = saved_and_loaded(state)
            torch.testing.assert_close(loaded, state, rtol=0, atol=0)
            optimizer.load_state_dict(loaded)


@weights_only_is_default
def test_metadata_of_every_data_set():
    metadata = {name: cls.METAINFO for name, cls in registered(DATASETS).items() if getattr(cls, 'METAINFO', None)}
    for name, value in metadata.items():
        assert saved_and_loaded(value) == value, name


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


class Points(torch.utils.data.Dataset):
    metainfo = dict(classes=list(np.unique(['b', 'a'])), palette=np.zeros((2, 3), np.uint8))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([float(index)]))


@pytest.mark.parametrize(
    'optimizer', [dict(type='AdamW', fused=True), dict(type='SGD', momentum=0.9)], ids=['AdamW', 'SGD']
)
def test_resumed_run_is_an_undisturbed_one(tmp_path, optimizer):
    """With averaged weights, two schedulers, and a data set with metadata of numpy."""

    def train(name, epochs, resume=False):
        one_cycle = dict(type='OneCycleLR', eta_max=0.1, total_steps=8, by_epoch=False, end=8)
        restarts = dict(type='CosineRestartLR', periods=[4, 4], restart_weights=[1, 1], eta_min=0, by_epoch=False, end=8)
        torch.manual_seed(0)
        runner = Runner(
            Line(),
            str(tmp_path / name),
            train_dataloader=dict(dataset=Points(), batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(lr=0.01, **optimizer)),
            param_scheduler=[one_cycle, restarts],
            custom_hooks=[dict(type='EMAHook')],
            resume=resume,
            experiment_name=f'{tmp_path.name}-{name}-{epochs}',
        )
        runner.train()

    train('undisturbed', 2)
    train('resumed', 1)
    train('resumed', 2, resume=True)
    undisturbed, resumed = (torch.load(tmp_path / name / 'epoch_2.pth') for name in ('undisturbed', 'resumed'))
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        torch.testing.assert_close(resumed[part], undisturbed[part], rtol=0, atol=0)
    assert resumed['param_schedulers'] == undisturbed['param_schedulers']
    assert resumed['meta']['dataset_meta']['classes'] == ['a', 'b']
