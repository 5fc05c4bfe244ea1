"""mmdet's own scripts and ours on a small network and data set: train, resume, test, mixed precision."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED
from conftest import run_script as run

mmdet = pytest.importorskip('mmdet', reason="these are mmdet's scripts")

STOCK = Path(mmdet.__file__).parent / '.mim' / 'tools'
OURS = ROOT / 'tools'
both_pairs = pytest.mark.parametrize('tools', [STOCK, OURS], ids=['stock', 'ours'])

SMALL_CONFIG = """
_base_ = [{base!r}]
data_root = {data_root!r}
metainfo = {metainfo!r}
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2),
            kernel_sizes=(7, 7, 7, 5)),
        drop_path_rate=0.1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[8, 16, 32, 40]),
    roi_head=dict(bbox_head=dict(num_classes={num_classes}), mask_head=dict(num_classes={num_classes})),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=16)), rpn_proposal=dict(nms_pre=50, max_per_img=8), rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=8), rcnn=dict(max_per_img=5)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = train_pipeline[:-1] + [
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""


def write_config(folder: Path, data_root: Path, metainfo: dict | None = None) -> Path:
    base = ROOT / 'configs' / 'mmdet' / 'mask-rcnn_overlock-t_fpn_1x_coco.py'
    metainfo = metainfo or dict(classes=('ball', 'sign', 'star', 'lifebuoy'))
    config = folder / 'small.py'
    config.write_text(
        SMALL_CONFIG.format(
            base=str(base), data_root=f'{data_root}/', metainfo=metainfo, num_classes=len(metainfo['classes'])
        )
    )
    return config


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r'Epoch\(train\).*?  loss: ([\d.]+|nan|inf)', output)]


@both_pairs
def test_train_resume_and_test(tools, demo_data, tmp_path):
    """In a folder outside the checkout: train one epoch, resume for a second one, and test the saved checkpoint."""
    config = write_config(tmp_path, demo_data)
    first = run(tools / 'train.py', config, '--work-dir', 'work', cwd=tmp_path)
    assert len(losses(first)) == 2
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()

    resumed = run(
        tools / 'train.py',
        config,
        '--work-dir',
        'work',
        '--resume',
        '--cfg-options',
        'train_cfg.max_epochs=2',
        cwd=tmp_path,
    )
    assert 'resumed epoch: 1' in resumed
    assert re.findall(r'Epoch\(train\) +\[(\d)\]', resumed) == ['2', '2']

    output = run(tools / 'test.py', config, 'work/epoch_2.pth', '--work-dir', 'tested', '--out', 'found.pkl', cwd=tmp_path)
    assert 'coco/segm_mAP_50' in output
    assert (tmp_path / 'found.pkl').is_file()
    (file,) = (tmp_path / 'tested').glob('*/[0-9]*.json')
    metrics = json.loads(file.read_text())
    assert {'coco/bbox_mAP_50', 'coco/segm_mAP_50'} <= set(metrics)


@both_pairs
def test_scaled_learning_rate(tools, demo_data, tmp_path):
    config = write_config(tmp_path, demo_data)
    output = run(tools / 'train.py', config, '--work-dir', 'work', '--auto-scale-lr', cwd=tmp_path)
    assert 'Scaling the original LR by 0.125.' in output  # batches of 2, not of 16
    assert len(losses(output)) == 2


@both_pairs
def test_mixed_precision(tools, demo_data, tmp_path):
    """mmengine's AmpOptimWrapper trains on a GPU only. Without a GPU, its error shows that --amp selected it."""
    config = write_config(tmp_path, demo_data)
    gpu = torch.cuda.is_available()
    visible = {'CUDA_VISIBLE_DEVICES': '0'} if gpu else {}
    output = run(tools / 'train.py', config, '--work-dir', 'work', '--amp', cwd=tmp_path, succeeds=gpu, **visible)
    if gpu:
        assert all(torch.isfinite(torch.tensor(losses(output))))
    else:
        assert 'is only available training on gpu' in output


@both_pairs
def test_foreign_object_in_a_checkpoint_is_refused(tools, demo_data, tmp_path):
    config = write_config(tmp_path, demo_data)
    torch.save(dict(state_dict={}, meta=dict(config=Path('unexpected'))), tmp_path / 'foreign.pth')
    output = run(tools / 'test.py', config, 'foreign.pth', cwd=tmp_path, succeeds=False)
    assert 'Weights only load failed' in output
    assert 'pathlib' in output


def test_missing_data_set_is_named(tmp_path):
    config = write_config(tmp_path, tmp_path / 'nowhere')
    output = run(OURS / 'train.py', config, '--work-dir', 'work', cwd=tmp_path, succeeds=False)
    assert re.search(r'No such file or directory: .*nowhere/annotations/instances_train2017.json', output)


@pytest.mark.parametrize(
    'script, arguments',
    [('train', ('config.py', '2', '--amp')), ('test', ('config.py', 'epoch_1.pth', '2', '--out', 'a.pkl'))],
)
def test_commands_of_the_distributed_scripts(tmp_path, script, arguments):
    """Only the command is tested, because mmengine's launcher needs a GPU for each process."""
    env = {**os.environ, 'PYTHON': 'echo', 'PORT': '29517', 'NNODES': '3', 'NODE_RANK': '1', 'MASTER_ADDR': 'first'}
    command = ['bash', str(OURS / f'dist_{script}.sh'), *arguments]
    words = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.split()
    assert words[:2] == ['-m', 'torch.distributed.run']
    for word in ('--nnodes=3', '--node_rank=1', '--nproc_per_node=2', '--master_addr=first', '--master_port=29517'):
        assert word in words
    rest = [word for word in arguments if word != '2']
    number = 1 if script == 'train' else 2
    assert words[words.index(str(OURS / f'{script}.py')) + 1 :] == [*rest[:number], '--launcher', 'pytorch', *rest[number:]]
    assert subprocess.run(command[:3], capture_output=True).returncode == 2


def test_real_pictures(tmp_path):
    """Pictures of COCO with all its 80 classes."""
    data = SHARED / 'data' / 'tiny_coco'
    if not data.is_dir():
        pytest.skip('100 pictures of COCO are missing (a folder shared/data/tiny_coco beside the checkout)')
    from mmdet.datasets import CocoDataset

    config = write_config(tmp_path, data, dict(classes=CocoDataset.METAINFO['classes']))
    output = run(
        STOCK / 'train.py', config, '--work-dir', 'work', '--cfg-options', 'train_dataloader.dataset.indices=4',
        'val_dataloader.dataset.indices=4', cwd=tmp_path,
    )  # fmt: skip
    assert len(losses(output)) >= 1
    output = run(
        STOCK / 'test.py', config, 'work/epoch_1.pth', '--cfg-options', 'test_dataloader.dataset.indices=4',
        'model.test_cfg.rcnn.score_thr=0.0', cwd=tmp_path,
    )  # fmt: skip
    assert 'coco/bbox_mAP' in output
