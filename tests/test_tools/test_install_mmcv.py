"""The build of mmcv knows what it builds for, and the Slurm script what it asks for."""

from __future__ import annotations

import os
import subprocess
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


def test_the_key_tells_torch_python_and_cuda_apart(install_mmcv, monkeypatch):
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


def test_slurm_script(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'GPUS': '4',
        'SRUN_ARGS': '--time=1 --mem=2',
        'PYTHON': 'py',
    }
    script = ROOT / 'tools' / 'slurm_train.sh'
    command = ['bash', script, 'gpu', 'job', 'config.py', 'work', '--amp']
    words = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    for word in ('--ntasks=4', '--ntasks-per-node=4', '--gres=gpu:4', '--time=1', '--mem=2', '--job-name=job'):
        assert word in words
    assert words[words.index('py') :] == [
        'py', '-u', str(script.with_name('train.py')), 'config.py', '--work-dir', 'work', '--launcher', 'slurm', '--amp',
    ]  # fmt: skip
    too_few = subprocess.run(['bash', script, 'gpu'], env=env, capture_output=True, text=True)
    assert too_few.returncode == 2
    assert 'tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR' in too_few.stderr


@pytest.mark.parametrize(
    'changed, step', [('requirements/mm.txt', 'requirements/mm.txt'), ('setup.py', 'install --no-build')]
)
def test_a_changed_pin_repeats_its_step(changed, step):
    """As make would do it, without doing it."""
    command = ['make', '--dry-run', f'--what-if={changed}', 'env', 'VENV=.venv']
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert step in done.stdout
