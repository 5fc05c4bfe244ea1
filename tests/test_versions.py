"""Missing packages raise a clear error, untested versions warn."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from overlock_mm import versions


@pytest.mark.parametrize(
    'version, numbers', [('2.11.0+cu130', (2, 11, 0)), ('2.1.0rc1', (2, 1)), ('1.10', (1, 10)), ('0.10.7', (0, 10, 7))]
)
def test_version_numbers(version, numbers):
    assert versions.version_numbers(version) == numbers


def test_error_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, 'no_such_module', ('no-such-package', '1.2', '1.3'))
    with pytest.raises(ImportError, match=r'the head needs no_such_module, .* pip install "no-such-package>=1.2,<1.3"'):
        versions.require('no_such_module', 'the head')


def test_versions_of_the_forks_do_not_warn(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, 'mmengine', ('mmengine', '99.0', None))
    monkeypatch.setitem(versions.FORKS, 'mmengine', ('0.10.0', '0.11.0'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        versions.require('mmengine', 'this test')


def test_unsupported_version_warns(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, 'mmengine', ('mmengine', '99.0', None))
    with pytest.warns(UserWarning, match=r'mmengine .* outside the supported range, mmengine>=99.0'):
        versions.require('mmengine', 'this test')


def test_pinned_versions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for module in ('torch', 'mmengine'):
            versions.require(module, 'this test')


BLOCK_IMPORTS = (
    'import sys\n'
    'class Blocker:\n'
    '    def find_spec(self, name, path=None, target=None):\n'
    '        if name.split(".")[0] in {blocked!r}:\n'
    '            raise ModuleNotFoundError(name)\n'
    'sys.meta_path.insert(0, Blocker())\n'
    'import importlib.util\n'
    'find_spec = importlib.util.find_spec\n'
    'importlib.util.find_spec = lambda name, *rest: None if name in {blocked!r} else find_spec(name, *rest)\n'
)


def run_without(blocked, code):
    """Run code in a process where importing the blocked modules raises ImportError."""
    command = [sys.executable, '-c', BLOCK_IMPORTS.format(blocked=blocked) + code]
    return subprocess.run(command, capture_output=True, text=True)


def test_backbone_needs_torch_and_mmengine_only():
    code = (
        'import torch\n'
        'from mmengine.registry import MODELS\n'
        'from overlock_mm.models import OverLoCK\n'
        'with torch.no_grad():\n'
        '    print(*OverLoCK("xt").eval()(torch.zeros(1, 3, 64, 96))[0].shape)\n'
        'print(type(MODELS.build(dict(type="overlock_mm.OverLoCK", arch="xt"))).__name__)'
    )
    done = run_without(['mmcv', 'mmdet', 'mmseg', 'mmpretrain'], code)
    assert done.stdout.splitlines()[-2:] == ['1 420 2 3', 'OverLoCK'], done.stderr


def test_head_without_mmpretrain():
    code = (
        'from mmengine.registry import MODELS\n'
        'MODELS.build(dict(type="overlock_mm.OverLoCKHead", num_classes=2, in_channels=4))'
    )
    done = run_without(['mmpretrain'], code)
    assert done.returncode != 0
    assert 'needs mmpretrain, which is not installed: pip install "mmpretrain>=1.0.0,<1.3.0"' in done.stderr


def test_models_without_mmengine():
    done = run_without(['mmengine'], 'import overlock_mm.models')
    assert (
        'ImportError: overlock_mm.models needs mmengine, which is not installed: pip install "mmengine>=0.10.0,<0.11.0"'
        in done.stderr
    )


def test_operators_need_torch_only():
    code = 'from overlock_mm.ops import contmix\nprint("imported")'
    done = run_without(['mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'], code)
    assert done.stdout.split() == ['imported'], done.stderr


def test_scripts_name_the_framework_of_a_config():
    from conftest import ROOT

    code = (
        'import argparse\n'
        f'sys.path.insert(0, {str(ROOT / "tools")!r})\n'
        'import launch\n'
        f'config = {str(ROOT / "configs/mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py")!r}\n'
        'options = dict(config=config, launcher="none", cfg_options=None, work_dir=None, local_rank=0)\n'
        'launch.load_config(argparse.Namespace(**options))'
    )
    done = run_without(['mmdet'], code)
    assert 'needs mmdet, which is not installed: pip install "mmdet>=3.0.0,<3.4.0"' in done.stderr
