"""Clear words where something is missing or of an untried version."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from overlock_mm import versions


@pytest.mark.parametrize(
    'version, numbers', [('2.11.0+cu130', (2, 11, 0)), ('2.1.0rc1', (2, 1)), ('1.10', (1, 10)), ('0.10.7', (0, 10, 7))]
)
def test_numbers(version, numbers):
    assert versions.version_numbers(version) == numbers


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, 'no_such_module', ('no-such-package', '1.2', '1.3'))
    with pytest.raises(ImportError, match=r'the head needs no_such_module, .* pip install "no-such-package>=1.2,<1.3"'):
        versions.require('no_such_module', 'the head')


def test_the_forks_versions_do_not_warn(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, 'mmengine', ('mmengine', '99.0', None))
    monkeypatch.setitem(versions.FORKS, 'mmengine', ('a-fork', '0.10.0', '0.11.0'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        versions.require('mmengine', 'this test')


def test_other_version_warns_only(monkeypatch):
    monkeypatch.delitem(versions.FORKS, 'mmengine')
    monkeypatch.setitem(versions.SUPPORTED, 'mmengine', ('mmengine', '99.0', None))
    with pytest.warns(UserWarning, match=r'mmengine .* outside the range tried, mmengine>=99.0'):
        versions.require('mmengine', 'this test')


def test_the_pinned_stack_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for module in ('torch', 'mmengine', 'mmcv'):
            versions.require(module, 'this test')


BLOCKER = (
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
    return subprocess.run([sys.executable, '-c', BLOCKER.format(blocked=blocked) + code], capture_output=True, text=True)


def test_the_backbone_needs_neither_mmdet_nor_mmseg_nor_mmpretrain():
    code = (
        'from mmengine.registry import MODELS\nMODELS.build(dict(type="overlock_mm.OverLoCK", arch="xt"))\nprint("built")'
    )
    done = run_without(['mmdet', 'mmseg', 'mmpretrain'], code)
    assert done.stdout.split()[-1:] == ['built'], done.stderr


def test_the_head_says_that_it_needs_mmpretrain():
    code = (
        'from mmengine.registry import MODELS\n'
        'MODELS.build(dict(type="overlock_mm.OverLoCKHead", num_classes=2, in_channels=4))'
    )
    done = run_without(['mmpretrain'], code)
    assert done.returncode != 0
    assert 'needs mmpretrain, which is not installed: pip install "mmpretrain>=1.0.0,<1.3.0"' in done.stderr


def test_the_models_say_that_they_need_mmcv():
    done = run_without(['mmcv'], 'import overlock_mm.models')
    assert (
        'ImportError: overlock_mm.models needs mmcv, which is not installed: pip install "mmcv>=2.0.0,<2.2.0"'
        in done.stderr
    )


def test_the_operator_needs_torch_only():
    code = 'from overlock_mm.ops import contmix\nprint("imported")'
    done = run_without(['mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'], code)
    assert done.stdout.split() == ['imported'], done.stderr


def test_the_scripts_say_which_framework_a_config_needs():
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
