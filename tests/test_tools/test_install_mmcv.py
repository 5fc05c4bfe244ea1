"""The build of mmcv: its version, the key of its wheel, when it is built with CUDA."""

from __future__ import annotations

import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file


@pytest.fixture
def install_mmcv():
    return import_file(ROOT / 'tools' / 'install_mmcv.py')


def test_the_pinned_version_is_read(install_mmcv, tmp_path):
    assert install_mmcv.pinned_version(ROOT / 'requirements' / 'mmcv.txt') == '2.1.0'
    (tmp_path / 'none.txt').write_text('torch==2.11.0\n')
    with pytest.raises(SystemExit, match='none.txt has no line "mmcv==VERSION"'):
        install_mmcv.pinned_version(tmp_path / 'none.txt')


def test_the_key_differs_by_torch_python_and_cuda(install_mmcv, monkeypatch):
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0;9.0')
    keys = {install_mmcv.wheel_key(False)}
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    keys.add(install_mmcv.wheel_key(True))
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    keys.add(install_mmcv.wheel_key(True))
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '9.0')
    keys.add(install_mmcv.wheel_key(True))
    monkeypatch.setattr(torch, '__version__', '2.10.0')
    keys.add(install_mmcv.wheel_key(False))
    monkeypatch.setattr(install_mmcv, 'sys', SimpleNamespace(version_info=SimpleNamespace(major=3, minor=99)))
    keys.add(install_mmcv.wheel_key(False))
    assert len(keys) == 6


@pytest.mark.parametrize(
    'forced, gpu, nvcc_says, builds',
    [
        (None, False, 'release 13.0, V13.0.1', False),
        (None, True, 'release 13.0, V13.0.1', True),
        (None, True, 'release 12.4, V12.4.1', False),
        ('0', True, 'release 13.0, V13.0.1', False),
        ('1', False, 'release 13.0, V13.0.1', True),
    ],
)
def test_when_cuda_is_built(install_mmcv, monkeypatch, tmp_path, capsys, forced, gpu, nvcc_says, builds):
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, {nvcc_says}"\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(install_mmcv, 'CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    if forced is None:
        monkeypatch.delenv('FORCE_CUDA', raising=False)
    else:
        monkeypatch.setenv('FORCE_CUDA', forced)
    assert install_mmcv.builds_with_cuda() is builds
    says_why = 'torch is built for CUDA 13.0' in capsys.readouterr().out
    assert says_why == (gpu and not builds and forced is None)


def test_forced_cuda_without_a_toolkit_stops(install_mmcv, monkeypatch):
    monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(install_mmcv, 'CUDA_HOME', None)
    with pytest.raises(SystemExit, match='FORCE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME'):
        install_mmcv.builds_with_cuda()


def test_a_built_wheel_is_taken(install_mmcv, monkeypatch, tmp_path):
    """From an index for this torch and the CPU, in a folder; None where it has no such wheel."""
    minor = '.'.join(torch.__version__.split('.')[:2])
    index = tmp_path / 'index' / 'cpu' / f'torch{minor}.0' / 'index.html'
    index.parent.mkdir(parents=True)
    with zipfile.ZipFile(index.with_name('mmcv-2.1.0-py3-none-any.whl'), 'w') as wheel:
        wheel.writestr('mmcv-2.1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n')
        wheel.writestr('mmcv-2.1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\n')
    index.write_text('<a href="mmcv-2.1.0-py3-none-any.whl">mmcv-2.1.0-py3-none-any.whl</a>')
    monkeypatch.setattr(install_mmcv, 'INDEX', (tmp_path / 'index').as_uri())
    (tmp_path / 'cache').mkdir()
    assert install_mmcv.find_built('9.9.9', False, tmp_path / 'cache') is None
    assert install_mmcv.find_built('2.1.0', False, tmp_path / 'cache').name == 'mmcv-2.1.0-py3-none-any.whl'


def test_a_wheel_that_does_not_work_is_built_instead(install_mmcv, monkeypatch, tmp_path, capsys):
    """A kept one and a downloaded one are removed. What is built is kept."""
    installed = []

    def run(command, **_):
        installed.append(command[-1])

    def source(name):
        def find(version, cuda, folder):
            (folder / name).touch()
            return folder / name

        return find

    names = ('mmcv-kept.whl', 'mmcv-found.whl', 'mmcv-built.whl')
    monkeypatch.setattr(install_mmcv, 'SOURCES', {name: source(name) for name in names})
    monkeypatch.setattr(install_mmcv, 'works', lambda *_: installed[-1:] == [str(folder / names[2])])
    monkeypatch.setattr(install_mmcv, 'builds_with_cuda', lambda: False)
    monkeypatch.setattr(install_mmcv.subprocess, 'run', run)
    monkeypatch.setattr('sys.argv', ['install_mmcv.py', '--cache', str(tmp_path)])
    version = install_mmcv.pinned_version(ROOT / 'requirements' / 'mmcv.txt')
    folder = tmp_path / f'mmcv-{version}' / install_mmcv.wheel_key(False)
    install_mmcv.main()
    assert [path.rsplit('/', 1)[-1] for path in installed] == list(names)
    assert sorted(path.name for path in folder.glob('*.whl')) == [names[2]]

    installed.clear()
    monkeypatch.setattr(install_mmcv, 'works', lambda *_: False)
    with pytest.raises(SystemExit, match=f'mmcv {version} was built and installed, but its operators do not load'):
        install_mmcv.main()


@pytest.mark.parametrize(
    'changed, step',
    [
        ('requirements/mm.txt', 'requirements/mm.txt'),
        ('requirements/nvrtc-cu12.txt', '--target .venv/nvrtc/cu12 -r requirements/nvrtc-cu12.txt'),
        ('setup.py', 'install --no-build'),
    ],
)
def test_a_changed_pin_repeats_its_step(changed, step):
    """As make would do it, in a dry run."""
    command = ['make', '--dry-run', f'--what-if={changed}', 'env', 'VENV=.venv']
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert step in done.stdout
