"""Shared by the tests: fixtures (parity data, a small network, a small data set) and helper functions."""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'


#: Tests compare with float64, and PyTorch's default is TF32 for convolutions.
torch.backends.cudnn.allow_tf32 = False


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU')


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a GPU')


@pytest.fixture(scope='module', autouse=True)
def _set_aside():
    """Garbage collections look at the objects of their own file. After many files, collections of all take seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def small_arch():
    """A network with every kind of block and odd numbers of channels per group. It runs in milliseconds."""
    return dict(
        channels=(8, 12, 24, 40), depths=(1, 1, 1, 1), sub_depths=(2, 2), num_groups=(2, 4), kernel_sizes=(9, 7, 7, 5)
    )


@pytest.fixture
def no_network(monkeypatch):
    """Make every network connection fail."""

    def refuse(*args, **kwargs):
        raise AssertionError(f'a network connection to {args}')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)


def import_file(path: Path):
    """Import a script that is not in a package."""
    spec = importlib.util.spec_from_file_location(f'imported_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parity:
    """Outputs of the published code with their weights and inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fill = import_file(folder / 'fill.py')
        self.input_for = self._fill.input_for
        self.state_dict_for = self._fill.state_dict_for

    def keys(self, family: str, arch: str) -> dict[str, list[int]]:
        with gzip.open(self.folder / f'keys_{family}.json.gz') as file:
            return json.load(file)[arch]

    def state_dict(self, family: str, arch: str) -> dict[str, torch.Tensor]:
        return self.state_dict_for(self.keys(family, arch))


@pytest.fixture(scope='session')
def parity() -> Parity:
    folder = SHARED / 'parity'
    if not folder.is_dir():
        pytest.skip('the outputs of the published code are missing (a folder shared/parity beside the checkout)')
    return Parity(folder)


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory) -> Path:
    """A few images of the demo's data set."""
    root = tmp_path_factory.mktemp('data') / 'demo'
    script = ROOT / 'tools' / 'demo' / 'make_dataset.py'
    subprocess.run([sys.executable, script, root, '--train', '4', '--val', '4'], check=True, capture_output=True)
    return root


def run_script(*arguments: object, cwd: Path, succeeds: bool = True, **variables: str) -> str:
    """Run a Python script on the CPU, with environment variables, and return its output."""
    command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', **variables}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output[-4000:]
    return output


@contextlib.contextmanager
def names_with_gradient(model: torch.nn.Module):
    """Record the names of the parameters that get a nonzero gradient in this context.

    Hooks record them, because mmengine's optimisers clear gradients at the end of a step.
    """
    names = set()

    def record(name: str, gradient: torch.Tensor) -> None:
        if gradient.any():
            names.add(name)

    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [parameter.register_hook(functools.partial(record, name)) for name, parameter in parameters]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


class KeptBytes(TorchDispatchMode):
    """Context that counts the bytes of storages that were created in it and are still alive, as kept for a backward.

    Saved-tensor hooks would count too little: a network with its own hooks hides the tensors that it recomputes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def count(self, *known: torch.Tensor) -> int:
        """Bytes of storages that still live, without those of known tensors."""
        known_storages = {tensor.untyped_storage()._cdata for tensor in known}
        kept = [value for place, value in self._storages.items() if place not in known_storages]
        return sum(size for storage, size in kept if not storage.expired())


def relative_error(got: torch.Tensor, expected) -> float:
    """Frobenius norm of the difference divided by that of the expected tensor, in float64. NaN fails every comparison."""
    expected = torch.as_tensor(expected).double()
    return ((got.detach().double() - expected).norm() / expected.norm()).item()


#: Dtypes of CPU autocast. Old versions of torch support bfloat16 only.
autocast_dtypes = pytest.mark.parametrize(
    'dtype',
    [
        torch.bfloat16,
        pytest.param(
            torch.float16,
            marks=pytest.mark.skipif(
                tuple(map(int, torch.__version__.split('.')[:2])) < (2, 3),
                reason='CPU autocast of torch < 2.3 has no float16',
            ),
        ),
    ],
    ids=['bfloat16', 'float16'],
)

#: Of tests that need a GPU. `pytest -m gpu` runs them alone.
needs_gpu = pytest.mark.gpu
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])

#: Values of ATEN_CPU_CAPABILITY, None for none, and the kernels of the binary that run with each.
instruction_sets = pytest.mark.parametrize(
    'capability, instruction_set',
    [('default', 'baseline'), ('avx2', 'avx2'), ('avx512', 'avx512'), (None, 'avx512_bf16')],
)


def run_with_instruction_set(code: str, test_file: str, capability: Optional[str], instruction_set: str) -> None:
    """Run code that imports from a test's file with one instruction set. A switch of torch disables the others."""
    from overlock_mm.ops import _library

    known = {'baseline': 0, 'avx2': 1, 'avx512': 2, 'avx512_bf16': 3}
    if known[instruction_set] > known[_library.build_info['cpu']]:
        pytest.skip(f'this processor has no {instruction_set}')
    prelude = f"""
import sys
sys.path[:0] = [{str(Path(test_file).parent)!r}, {str(ROOT / 'tests')!r}]
from overlock_mm.ops import _library
assert _library.build_info['cpu'] == {instruction_set!r}, _library.build_info
"""
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    environment.pop('ATEN_CPU_CAPABILITY', None)
    if capability is not None:
        environment['ATEN_CPU_CAPABILITY'] = capability
    command = [sys.executable, '-W', 'ignore', '-c', prelude + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
