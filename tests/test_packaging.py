"""Contents of a wheel, and the package in other environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

BINARY = ROOT / 'overlock_mm' / 'ops' / '_C.abi3.so'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel of a copy of the checkout, so that the checkout stays as it is. Its binary is that of the environment, which
    the same setup.py has compiled: to compile it again takes minutes.
    """
    folder = tmp_path_factory.mktemp('wheel')
    source, library = folder / 'source', folder / 'library'
    ignored = shutil.ignore_patterns('.*', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source, ignore=ignored)
    (source / 'setup.cfg').write_text(f'[build]\nbuild_lib = {library}\n')
    setup_py(source, 'build_py')
    shutil.copy2(BINARY, library / 'overlock_mm' / 'ops')
    setup_py(source, 'bdist_wheel', '--skip-build', '--dist-dir', folder)
    return next(folder.glob('*.whl'))


def setup_py(source: Path, *arguments) -> None:
    command = [sys.executable, 'setup.py', '-q', *map(str, arguments)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0].split('-')[0] for name in names} == {'overlock_mm'}
    resources = {name.removeprefix('overlock_mm/.mim/') for name in names if name.startswith('overlock_mm/.mim/')}
    configs = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.*') if path.suffix in ('.py', '.yml')
    }
    assert {name for name in resources if not name.startswith('tools/')} == {*configs, 'model-index.yml'}
    assert {'tools/train.py', 'tools/dist_train.sh', 'tools/convert_checkpoint.py'} <= resources
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'overlock_mm' / 'ops' / 'csrc').rglob('*.*')}
    assert any(name.endswith('.cu') for name in sources)
    assert sources <= set(names)
    assert not any('__pycache__' in name or name.startswith('tests') for name in names)
    assert 'overlock_mm/ops/_C.abi3.so' in names
    assert '-cp39-abi3-' in wheel.name


@pytest.fixture(scope='module')
def environments(wheel, tmp_path_factory):
    """Return Python interpreters of two environments with the installed frameworks: one has the wheel, the other none of
    this package, for a checkout on PYTHONPATH.
    """
    folder = tmp_path_factory.mktemp('environments')
    stack = sysconfig.get_paths()['purelib']
    found = {}
    for name in ('wheel', 'checkout'):
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / name], check=True)
        python = folder / name / 'bin' / 'python'
        site = subprocess.run(
            [python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        # The frameworks, but not their .pth files, which would add the editable install of this package.
        (Path(site) / 'stack.pth').write_text(stack)
        if name == 'wheel':
            install = [
                sys.executable,
                '-m',
                'pip',
                '--python',
                python,
                'install',
                '-q',
                '--no-deps',
                '--ignore-installed',
                wheel,
            ]
            done = subprocess.run(install, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        found[name] = python
    return found


def run_in(environments, how, arguments, cwd, succeeds=True) -> str:
    """Run Python in one of the environments, or in that of the tests ('editable' after make)."""
    python = environments.get(how, sys.executable)
    variables = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    variables['CUDA_VISIBLE_DEVICES'] = ''
    if how == 'checkout':
        variables['PYTHONPATH'] = str(ROOT)
    command = [python, '-W', 'ignore', *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


ways = pytest.mark.parametrize('how', ['wheel', 'editable', 'checkout'])


@ways
def test_configs_are_inherited_from_another_folder(environments, tmp_path, how):
    """All forms of _base_, with changed variables, classes and variants."""
    where = run_in(environments, how, ['-c', 'import overlock_mm; print(overlock_mm.__file__)'], tmp_path).split()[-1]
    assert Path(where).is_relative_to(environments['wheel'].parents[1] if how == 'wheel' else ROOT)
    path = run_in(
        environments,
        how,
        ['-c', 'import overlock_mm; print(overlock_mm.get_config_path("mmdet/mask-rcnn_overlock-t_fpn_1x_coco"))'],
        tmp_path,
    ).split()[-1]
    by_name = "[__import__('overlock_mm').get_config_path('mmdet/mask-rcnn_overlock-{}_fpn_1x_coco')]"
    bases = {
        'path': repr(path),
        'variable': "'{{$OVERLOCK_CONFIGS:" + str(Path(path).parents[1]) + "}}/mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py'",
        'by_name': by_name.format('t'),
        'variant': by_name.format('s'),  # the only line that changes for another variant
    }
    if how == 'wheel':  # mmengine looks for configs in <package>/.mim
        bases['scope'] = "'overlock_mm::mmdet/mask-rcnn_overlock-t_fpn_1x_coco.py'"
    for name, base in bases.items():
        (tmp_path / f'{name}.py').write_text(
            f'_base_ = {base}\n'
            "classes = ('ball', 'sign')\n"
            'train_dataloader = dict(batch_size=1, dataset=dict(metainfo=dict(classes=classes)))\n'
            'model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))\n'
            'optim_wrapper = dict(optimizer=dict(lr=1e-5))\n'
        )
    code = (
        'import sys\n'
        'import overlock_mm\n'
        'from mmengine.config import Config\n'
        'for name in sys.argv[1:]:\n'
        '    cfg = Config.fromfile(f"{name}.py")\n'
        '    model, optimizer, loader = cfg.model, cfg.optim_wrapper.optimizer, cfg.train_dataloader\n'
        '    print("FOUND", name, model.backbone.arch, model.backbone.drop_path_rate, model.neck.in_channels[2],\n'
        '          model.roi_head.bbox_head.num_classes, optimizer.lr, optimizer.type,\n'
        '          loader.batch_size, len(loader.dataset.metainfo.classes))\n'
    )
    output = run_in(environments, how, ['-c', code, *bases], tmp_path)
    found = {line.split()[1]: line.split()[2:] for line in output.splitlines() if line.startswith('FOUND')}
    t = ['t', '0.2', '384', '2', '1e-05', 'AdamW', '1', '2']
    assert found == {name: (['s', '0.4', '448', *t[3:]] if name == 'variant' else t) for name in bases}


@ways
def test_tools_take_names_of_configs(environments, tmp_path, how):
    """The configs of a wheel lie in site-packages, and so do its tools."""
    code = (
        'import sys\n'
        'from overlock_mm.config_path import config_root\n'
        'sys.path.insert(0, str(config_root().parent / "tools"))\n'
        'import train\n'
        'cfg = train.load_config(train.parse_args())\n'
        'print("FOUND", cfg.model.backbone.arch, cfg.work_dir)'
    )
    name = 'mmpretrain/overlock-s_8xb256_in1k'
    output = run_in(environments, how, ['-c', code, name], tmp_path)
    assert output.split()[-3:] == ['FOUND', 's', 'work_dirs/overlock-s_8xb256_in1k']
    output = run_in(environments, how, ['-c', code, name.replace('in1k', 'in2k')], tmp_path, succeeds=False)
    assert f'nearest: {name}.py' in output


@ways
def test_stock_scripts_train_outside_the_checkout(environments, tmp_path, demo_data, pictures, how):
    """One step of a shipped config with each framework's own script, in a folder outside the checkout.

    The test changes the data, their sizes and the number of steps. Only the wheel is tested with all frameworks, the other
    installations with the cheapest one.
    """
    import mmpretrain

    frameworks = ('mmdet', 'mmseg', 'mmpretrain') if how == 'wheel' else ('mmpretrain',)
    for framework in frameworks:
        config = tmp_path / f'{framework}.py'
        config.write_text(STEPS[framework].format(demo=demo_data, pictures=pictures))
        script = Path(mmpretrain.__file__).parents[1] / framework / '.mim' / 'tools' / 'train.py'
        output = run_in(environments, how, [script, config, '--work-dir', f'work_{framework}'], tmp_path)
        assert re.search(r'loss: \d+\.\d+', output), output[-3000:]
        assert list((tmp_path / f'work_{framework}').glob('*_1.pth'))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A few pictures in the layout of ADE20K, and in one folder for each class."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('pictures')
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(root / 'images' / split / f'{i}.jpg'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            cv2.imwrite(str(root / 'annotations' / split / f'{i}.png'), rng.integers(0, 151, (64, 64), dtype=np.uint8))
    for label in ('cat', 'dog'):
        (root / 'classes' / label).mkdir(parents=True)
        cv2.imwrite(str(root / 'classes' / label / '0.png'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return root


STEPS = {
    'mmdet': """
_base_ = [__import__('overlock_mm').get_config_path('mmdet/mask-rcnn_overlock-xt_fpn_demo')]
data_root = '{demo}/'
train_dataloader = dict(dataset=dict(data_root=data_root, indices=2))
val_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
train_cfg = dict(max_epochs=1, val_interval=9)
default_hooks = dict(logger=dict(interval=1))
""",
    'mmseg': """
_base_ = [__import__('overlock_mm').get_config_path('mmseg/overlock-xt_upernet_8xb2-160k_ade20k-512x512')]
model = dict(data_preprocessor=dict(size=(64, 64)), backbone=dict(init_cfg=None))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]
train_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root='{pictures}', pipeline=pipeline))
val_dataloader = dict(dataset=dict(data_root='{pictures}'))
train_cfg = dict(max_iters=1, val_interval=9)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
""",
    'mmpretrain': """
_base_ = [__import__('overlock_mm').get_config_path('mmpretrain/overlock-xt_8xb256_in1k')]
model = dict(head=dict(num_classes=2, topk=(1,)))
data_preprocessor = dict(num_classes=2)
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs')]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='CustomDataset', data_root='{pictures}/classes', pipeline=pipeline))
val_dataloader = val_cfg = val_evaluator = None
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(save_best=None))
""",
}
