"""The backbone in models of mmseg and mmpretrain, and tools/train.py and test.py with their configs."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, names_with_gradient
from conftest import run_script as run
from mmengine.registry.utils import init_default_scope

TRAIN, TEST = ROOT / 'tools' / 'train.py', ROOT / 'tools' / 'test.py'
ARCH = """dict(
    channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_groups=(2, 2), kernel_sizes=(7, 7, 7, 5))"""

UPERNET = f"""
_base_ = ['mmseg::_base_/models/upernet_r50.py', 'mmseg::_base_/datasets/ade20k.py',
          'mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_160k.py']
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained=None,
    backbone=dict(_delete_=True, type='overlock_mm.OverLoCK', arch={ARCH}, out_type='pyramid'),
    decode_head=dict(in_channels=[8, 16, 32, 40], channels=16, norm_cfg=norm_cfg, num_classes=150),
    auxiliary_head=dict(in_channels=32, channels=8, norm_cfg=norm_cfg, num_classes=150))
"""

UPERNET_RUN = """
pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=True), dict(type="PackSegInputs")]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='InfiniteSampler'),
    dataset=dict(data_root='ade', pipeline=pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='ade', pipeline=pipeline))
test_dataloader = val_dataloader
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
"""

CLASSIFIER_RUN = f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='overlock_mm.OverLoCK', arch={ARCH}, out_indices=(4, 3)),
    head=dict(type='overlock_mm.OverLoCKHead', num_classes=2, in_channels=40, overview_channels=32))
data_preprocessor = dict(mean=[124, 116, 104], std=[58, 57, 57], to_rgb=True)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root='pictures', pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), visualization=dict(type='VisualizationHook'))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""


def test_upernet(tmp_path):
    """A training step gives losses, and a gradient for every parameter."""
    pytest.importorskip('mmseg', reason="this is mmsegmentation's model")
    from mmengine.config import Config
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    (tmp_path / 'config.py').write_text(UPERNET)
    model = MODELS.build(Config.fromfile(tmp_path / 'config.py').model)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 64)))) for _ in range(2)]
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    assert {'decode.loss_ce', 'aux.loss_ce'} <= set(losses)
    (losses['decode.loss_ce'] + losses['aux.loss_ce']).backward()
    # GRN starts as the identity: some gradients are zero, but none is None.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_contmix_in_a_resnet_of_mmseg():
    """Two steps with a dilated ResNet and an auxiliary head. The first step changes only the scale of each block."""
    pytest.importorskip('mmseg', reason="this is mmsegmentation's model")
    from mmengine.hub import get_config
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    cfg = get_config('mmseg::_base_/models/fcn_r50-d8.py')
    bn = dict(type='BN')  # the SyncBN of the config needs a GPU
    plugin = dict(cfg=dict(type='overlock_mm.ContMixBlock'), stages=(False, False, True, True), position='after_conv2')
    cfg.merge_from_dict(
        dict(
            model=dict(
                pretrained=None,
                data_preprocessor=dict(size=(64, 64)),
                # Like a pre-trained ResNet: residual branches at zero would block the gradients of the plugins at first.
                backbone=dict(base_channels=16, norm_cfg=bn, zero_init_residual=False, plugins=[plugin]),
                decode_head=dict(in_channels=512, channels=16, norm_cfg=bn),
                auxiliary_head=dict(in_channels=256, channels=16, norm_cfg=bn),
            )
        )
    )
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)))
    names = {name for name, _ in model.named_parameters() if '.contmix_block.' in name}
    labels = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 19, (1, 64, 64)))) for _ in range(2)]
    batch = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in labels], data_samples=labels)
    for expected in ({name for name in names if '.layer_scale.' in name}, names):
        with names_with_gradient(model) as found:
            logs = model.train_step(batch, optim_wrapper)
        assert {'decode.loss_ce', 'aux.loss_ce'} <= set(logs)
        assert torch.isfinite(logs['loss'])
        assert found & names == expected != set()


def test_our_scripts_train_and_test_a_segmentor(tmp_path):
    pytest.importorskip('mmseg', reason="this is mmsegmentation's model")
    rng = np.random.default_rng(0)
    for split, count in (('training', 4), ('validation', 2)):
        for kind in ('images', 'annotations'):
            (tmp_path / 'ade' / kind / split).mkdir(parents=True)
        for i in range(count):
            name = str(tmp_path / 'ade' / '{}' / split / f'{i}.{{}}')
            cv2.imwrite(name.format('images', 'jpg'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            cv2.imwrite(name.format('annotations', 'png'), rng.integers(0, 151, (64, 64), dtype=np.uint8))
    (tmp_path / 'config.py').write_text(UPERNET + UPERNET_RUN)
    assert 'mIoU' in run(TRAIN, 'config.py', '--work-dir', 'work', cwd=tmp_path)
    output = run(TEST, 'config.py', 'work/iter_2.pth', '--show-dir', 'drawn', cwd=tmp_path)
    assert 'mIoU' in output
    assert list((tmp_path / 'drawn').rglob('*.png'))


def test_our_scripts_train_and_test_a_classifier(tmp_path):
    pytest.importorskip('mmpretrain', reason="this is mmpretrain's model")
    rng = np.random.default_rng(0)
    for label in ('cat', 'dog'):
        (tmp_path / 'pictures' / label).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(tmp_path / 'pictures' / label / f'{i}.png'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (tmp_path / 'config.py').write_text(CLASSIFIER_RUN)
    output = run(TRAIN, 'config.py', '--work-dir', 'work', cwd=tmp_path)
    assert 'aux_loss' in output
    assert 'accuracy/top1' in output
    output = run(TEST, 'config.py', 'work/epoch_1.pth', '--show-dir', 'drawn', '--out', 'found.pkl', cwd=tmp_path)
    assert 'accuracy/top1' in output
    assert (tmp_path / 'found.pkl').is_file()
    assert list((tmp_path / 'drawn').rglob('*.*'))
