"""What a wheel carries, and what an environment with it sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    # A copy, so that the build leaves nothing in the checkout.
    ignored = shutil.ignore_patterns('.*', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '-q', '-w', folder, source]
    # For the CPU alone: the environment that the tests run in has been built with CUDA where there is a toolkit.
    done = subprocess.run(command, env={**os.environ, 'FORCE_CUDA': '0'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob('*.whl'))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0].split('-')[0] for name in names} == {'overlock_mm'}
    for name in ('configs/mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py', 'tools/train.py', 'tools/dist_train.sh'):
        assert f'overlock_mm/.mim/{name}' in names
    assert not any('__pycache__' in name or name.startswith('tests') for name in names)
    assert 'overlock_mm/ops/_C.abi3.so' in names
    assert '-cp39-abi3-' in wheel.name


def test_an_installed_wheel_finds_its_configs_and_inherits_one(wheel, tmp_path):
    """Outside the checkout, by ``_base_`` with get_config_path, as a downstream project does it."""
    target = tmp_path / 'site'
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-compile', '--target', target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    config = tmp_path / 'mine.py'
    config.write_text(
        "_base_ = [__import__('overlock_mm').get_config_path('mmdet/mask-rcnn_overlock-t_fpn_1x_coco')]\n"
        "model = dict(backbone=dict(arch='xt', init_cfg=None), neck=dict(in_channels=[56, 112, 340, 420]))\n"
    )
    code = (
        f'import sys; sys.path.insert(0, {str(target)!r})\n'
        'import overlock_mm\n'
        f'assert overlock_mm.__file__.startswith({str(target)!r}), overlock_mm.__file__\n'
        'assert overlock_mm.list_configs()\n'
        'from overlock_mm.ops import _extension\n'
        'assert not _extension.missing, _extension.missing\n'
        'from mmengine.config import Config\n'
        f'cfg = Config.fromfile({str(config)!r})\n'
        'print(cfg.model.type, cfg.model.backbone.arch, cfg.optim_wrapper.optimizer.lr)'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['MaskRCNN', 'xt', '0.0002']
